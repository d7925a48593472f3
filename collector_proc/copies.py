"""Copies that the tick does not wait for: on a GPU they run on a stream of their own, on a CPU they are done at once.

current stream   | tick tick tick | tick tick tick | tick ...     gathers into stage 0, stage 1, stage 0 ...
side stream                       | copy stage 0 |
                                                 ^ its event: from here on the host may tell the learner
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from collector_proc.simulators.base import Arrival

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]  # target and source of a copy, alike in shape and dtype


class Flight(Protocol):
    """Copies under way. Their sources must be left alone until they have arrived."""

    def arrived(self) -> bool:
        """Whether every target holds what was sent. Never waits."""
        ...

    def wait(self) -> None:
        """Let the host wait until it has arrived."""
        ...

    def join(self) -> None:
        """Put what the current stream is given from now on behind the copies; the host does not wait."""
        ...


class Copier(Protocol):
    """Starts copies behind everything the current stream was given before."""

    num_stages: int  # buffers that whoever fills and sends them in turn needs

    def start(self, pairs: Iterable[Pair]) -> Flight: ...


class Landed:
    """A flight that was over when it began."""

    def arrived(self) -> bool:
        return True

    def wait(self) -> None:
        """There is nothing to wait for."""

    def join(self) -> None:
        """Nothing is under way."""


class DirectCopier:
    """Between host memory and host memory: every copy is done when `start` returns."""

    num_stages = 1

    def start(self, pairs: Iterable[Pair]) -> Flight:
        for target, source in pairs:
            target.copy_(source)
        return Landed()


class StreamFlight:
    """Copies on side streams. events: recorded behind them; stream: the one that `join` holds back."""

    def __init__(self, events: Sequence[torch.cuda.Event], device: torch.device) -> None:
        self._events, self._device = events, device

    def arrived(self) -> bool:
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()

    def join(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        for event in self._events:
            stream.wait_event(event)


class StreamCopier:
    """On a GPU: a side stream that comes after the current one. Host memory at either end must be page-locked.

    device: the GPU that the sources lie on; other: a further GPU that targets lie on.
    """

    num_stages = 2

    def __init__(self, device: torch.device, other: torch.device | None = None) -> None:
        self._device, self._other = device, other
        self._stream = torch.cuda.Stream(device)

    def start(self, pairs: Iterable[Pair]) -> Flight:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        streams = [self._stream]
        if self._other is not None:  # a copy between GPUs ends on the current stream of the one it goes to
            streams.append(torch.cuda.current_stream(self._other))
        events = [torch.cuda.Event() for _ in streams]
        for event, stream in zip(events, streams, strict=True):
            event.record(stream)
        return StreamFlight(events, self._device)


def copier_between(device: torch.device, target: torch.device | None) -> Copier:
    """What carries chunks from the acting device to where the replay lies."""
    gpus = [d for d in (device, target) if d is not None and d.type == "cuda"]
    if not gpus:
        return DirectCopier()
    further = [d for d in gpus[1:] if d != gpus[0]]
    return StreamCopier(gpus[0], *further)


class Stages(Generic[T]):
    """Equal buffers, filled and sent in turn: `current` is never one whose copies are still under way."""

    def __init__(self, copier: Copier, make: Callable[[], T]) -> None:
        self._copier = copier
        self.all = [make() for _ in range(copier.num_stages)]
        self._flights: list[Flight] = [Landed() for _ in self.all]
        self._index = 0

    @property
    def current(self) -> T:
        return self.all[self._index]

    def send(self, pairs: Iterable[Pair]) -> Flight:
        """Start copies out of the current stage and go on with the next."""
        flight = self._flights[self._index] = self._copier.start(pairs)
        self._index = (self._index + 1) % len(self.all)
        self._flights[self._index].join()
        return flight


class Landing:
    """Arrivals on the acting device. Those of a simulator on the host are copied once a tick, through page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: dict[str, Tensor] = {}

    def __call__(self, arrival: Arrival) -> Arrival:
        """The arrival, or its copy. Call it once a tick, after the action of the last one has reached the host:

        then the copies of that tick are over, and the page-locked memory may be written again.
        """
        if arrival.reward.device.type == self._device.type:
            return arrival
        assert self._device.type == "cuda", (arrival.reward.device, self._device)
        flags = {name: getattr(arrival, name) for name in ("reward", "is_first", "is_last", "is_terminal")}
        flags |= {} if arrival.diverged is None else {"diverged": arrival.diverged}
        acting = None if arrival.acting_obs is None else self._brought("acting_obs.", arrival.acting_obs)
        return replace(arrival, obs=self._brought("obs.", arrival.obs), acting_obs=acting, **self._brought("", flags))

    def _brought(self, prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._bring(prefix + name, entry) for name, entry in entries.items()}

    def _bring(self, name: str, entry: Tensor) -> Tensor:
        if name not in self._locked:
            self._locked[name] = torch.empty_like(entry, pin_memory=True)
        return self._locked[name].copy_(entry).to(self._device, non_blocking=True)
