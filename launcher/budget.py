"""How many deaths of the collector a run survives, and when they are forgotten. Torch-free."""

from __future__ import annotations

from shared.progress import Snapshot

STREAMING = ("collecting", "waiting")  # phases of a collector that has come through its start
USEFUL = 10  # times its start that a collector has to collect for, before it may end for memory without a count


class RestartBudget:
    """Deaths of the collector against a maximum; `healthy_after_s` seconds of collecting since the last one clear them.

    Collecting lasts from an incarnation's first account in a phase of STREAMING to when it last moved in one. An end for
    memory that was excused does not interrupt it: what the incarnations before and after it collected is added up.

    Example, healthy_after_s=3600: a death, 50 minutes of collecting, an excused end, 10 minutes: the death is forgotten.
    """

    def __init__(self, maximum: int, *, healthy_after_s: float) -> None:
        self._maximum, self._healthy_after_s = maximum, healthy_after_s
        self._began = 0.0
        self._streaming_since: float | None = None
        self._streamed_s = 0.0  # by this incarnation
        self._streamed_before_s = 0.0  # by those before it, since the last death
        self.deaths = 0

    def started(self, *, at: float) -> None:
        """An incarnation starts; what is observed from here is its own. at: time.monotonic()."""
        self._began, self._streaming_since, self._streamed_s = at, None, 0.0

    def observe(self, collector: Snapshot) -> None:
        """Take note of the collector's latest account."""
        if collector.phase not in STREAMING:
            return
        if self._streaming_since is None:
            self._streaming_since = collector.phase_since
        self._streamed_s = collector.changed_at - self._streaming_since
        if self._streamed_before_s + self._streamed_s >= self._healthy_after_s:
            self.deaths = 0

    def excuses(self) -> bool:
        """Whether an incarnation that ended for memory had collected for a useful time, so that no death is to be counted.

        Useful is USEFUL times its own start, or `healthy_after_s` if that is shorter: a run that only ever starts ends.
        """
        if self._streaming_since is None:
            return False
        if self._streamed_s < min(USEFUL * (self._streaming_since - self._began), self._healthy_after_s):
            return False
        self._streamed_before_s += self._streamed_s
        return True

    def allows_another(self) -> bool:
        """Count a death; whether the collector may be started once more."""
        self._streamed_before_s = 0.0
        self.deaths += 1
        return self.deaths <= self._maximum
