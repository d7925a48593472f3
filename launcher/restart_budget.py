"""The restart budget: which ends of a collector count as deaths, and how many deaths a run survives. Torch-free.

    how the collector ended                                         does it count as a death?
    it crashed, or it hung and was killed                           yes
    it exceeded collector.max_rss_gb and had done useful work       no
    it exceeded collector.max_rss_gb before that                    yes

A collector has done useful work if it has collected for ten times as long as its start took, or for
collector.healthy_after_s if that is shorter. Without this rule, a memory limit that is too low would restart collectors
forever.

The run ends at the first death beyond collector.max_restarts. All deaths are forgotten as soon as the collectors since
the last death have collected for collector.healthy_after_s in total. Restarts that are no deaths do not reset this
time.

Example with collector.healthy_after_s=3600: a collector crashes. The next one collects for 50 minutes and exceeds the
memory limit: no death. The one after it collects for 10 minutes: now the crash is forgotten.
"""

from __future__ import annotations

from shared.progress import Snapshot

COLLECTING_PHASES = ("collecting", "waiting")  # the phases of a collector whose start is complete
USEFUL_FACTOR = 10


class RestartBudget:
    """Counts the deaths of a run's collectors. All times are time.monotonic() seconds."""

    def __init__(self, max_restarts: int, *, healthy_after_s: float) -> None:
        self._max_restarts, self._healthy_after_s = max_restarts, healthy_after_s
        self._started_at = 0.0  # of the present collector
        self._collecting_since: float | None = None  # None until the present collector collects
        self._collected_s = 0.0  # by the present collector
        self._collected_before_s = 0.0  # by earlier collectors since the last death
        self.deaths = 0

    def started(self, *, at: float) -> None:
        """A new collector starts: what is observed from now on is about this one."""
        self._started_at, self._collecting_since, self._collected_s = at, None, 0.0

    def observe(self, collector: Snapshot) -> None:
        """Measure how long the present collector has collected, up to its last progress, and forget deaths if due."""
        if collector.phase not in COLLECTING_PHASES:
            return
        if self._collecting_since is None:
            self._collecting_since = collector.phase_since
        self._collected_s = collector.changed_at - self._collecting_since
        if self._collected_before_s + self._collected_s >= self._healthy_after_s:
            self.deaths = 0

    def exceeded_memory(self) -> bool:
        """Return whether the present collector, which exceeded the memory limit, had done useful work.

        If so, its collecting time counts towards forgetting deaths. If not, the caller counts a death with `died`.
        """
        if self._collecting_since is None:
            return False
        start_s = self._collecting_since - self._started_at
        if self._collected_s < min(USEFUL_FACTOR * start_s, self._healthy_after_s):
            return False
        self._collected_before_s += self._collected_s
        return True

    def died(self) -> bool:
        """Count a death of the present collector. Return whether the budget allows another start."""
        self._collected_before_s = 0.0
        self.deaths += 1
        return self.deaths <= self._max_restarts
