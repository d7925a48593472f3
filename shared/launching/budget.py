"""How many deaths of the collector a run survives, and when they are forgotten. Torch-free."""

from __future__ import annotations

from shared.supervision import Snapshot

STREAMING = ("collecting", "waiting")  # phases of a collector that has come through its start


class RestartBudget:
    """Deaths of the collector against a maximum; one incarnation that streamed for `healthy_after_s` seconds clears them.

    Time is the collector's own: from its first account in a phase of STREAMING to when it moved last.
    """

    def __init__(self, maximum: int, *, healthy_after_s: float) -> None:
        self._maximum, self._healthy_after_s = maximum, healthy_after_s
        self._pid = -1
        self._streaming_since: float | None = None
        self.deaths = 0

    def observe(self, collector: Snapshot) -> None:
        """Take note of the collector's latest account."""
        if collector.pid != self._pid:
            self._pid, self._streaming_since = collector.pid, None
        if collector.phase not in STREAMING:
            return
        if self._streaming_since is None:
            self._streaming_since = collector.phase_since
        if collector.changed_at - self._streaming_since >= self._healthy_after_s:
            self.deaths = 0

    def allows_another(self) -> bool:
        """Count a death; whether the collector may be started once more."""
        self.deaths += 1
        return self.deaths <= self._maximum
