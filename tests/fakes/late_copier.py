"""A GPU's side stream in slow motion: copies happen when the test says so, or when somebody really has to wait for them."""

from __future__ import annotations

from collections.abc import Iterable

from collector_proc.copies import Pair


class LateFlight:
    """Reads its sources only when it lands, so whoever writes to them before then is found out."""

    def __init__(self, copier: LateCopier, pairs: Iterable[Pair]) -> None:
        self._copier, self._pairs, self.landed = copier, list(pairs), False

    def land(self) -> None:
        for target, source in [] if self.landed else self._pairs:
            target.copy_(source)
        self.landed = True

    def arrived(self) -> bool:
        return self.landed

    def wait(self) -> None:
        self._copier.num_host_waits += not self.landed
        self._copier.land()

    def join(self) -> None:
        self._copier.num_late_joins += not self.landed
        self.land()  # what comes after it on the stream finds it done


class LateCopier:
    """Two stages, like a GPU's. num_host_waits, num_late_joins: how often host or stream met copies under way."""

    num_stages = 2

    def __init__(self) -> None:
        self.flights: list[LateFlight] = []
        self.num_host_waits = self.num_late_joins = 0

    @property
    def under_way(self) -> int:
        return sum(not flight.landed for flight in self.flights)

    def start(self, pairs: Iterable[Pair]) -> LateFlight:
        self.flights.append(LateFlight(self, pairs))
        return self.flights[-1]

    def land(self) -> None:
        """Let everything arrive, in order."""
        for flight in self.flights:
            flight.land()
