"""The restart budget: which ends of a process count as deaths, and how many deaths a run survives. Torch-free.

    how the process ended                                           does it count as a death?
    it crashed, or it hung and was killed                           yes
    a collector exceeded collector.max_rss_gb after useful work     no
    a collector exceeded collector.max_rss_gb before that           yes
    a collector was replaced after collector.recycle_after_hours    no

A collector has done useful work if it has collected for ten times as long as its start took, or for
collector.healthy_after_s if that is shorter. Without this rule, a memory limit that is too low would restart collectors
forever.

The run ends at the first death beyond the largest number. Each death is forgotten after an hour of work
(collector.healthy_after_s of collecting, TRAINING_WINDOW_S of training) by the processes that follow. Time in which
nothing is collected or trained does not count, so a process that can never start uses up its budget.

Example with collector.healthy_after_s=3600: a collector crashes. The next one collects for 50 minutes and exceeds the
memory limit: no death. The one after it collects for 10 minutes: now the crash is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.progress import Snapshot

COLLECTING_PHASES = ("collecting", "waiting")  # the phases of a collector whose start is complete
TRAINING_PHASES = ("training", "saving")  # those of a learner
TRAINING_WINDOW_S = 3600.0
USEFUL_FACTOR = 10
MAX_PAUSE_S = 300.0


class RestartBudget:
    """Counts the deaths of one kind of process. All times are time.monotonic() seconds.

    healthy_after_s: after so much work a death is forgotten. working: the phases that are work.
    """

    def __init__(
        self, max_restarts: int, *, healthy_after_s: float, working: Sequence[str] = COLLECTING_PHASES
    ) -> None:
        self._max_restarts, self._healthy_after_s, self._working = max_restarts, healthy_after_s, working
        self._started_at = 0.0  # of the present process
        self._working_since: float | None = None  # None until the present process works
        self._worked_s = 0.0  # by the present process
        self._worked_before_s = 0.0  # by earlier processes
        self._deaths: list[float] = []  # how much work was done before each death

    @property
    def deaths(self) -> int:
        """How many deaths are remembered."""
        return len(self._deaths)

    def started(self, *, at: float) -> None:
        """A new process starts: what is observed from now on is about this one."""
        self._worked_before_s += self._worked_s
        self._started_at, self._working_since, self._worked_s = at, None, 0.0

    def observe(self, process: Snapshot) -> None:
        """Measure how long the present process has worked, up to its last progress, and forget deaths if due."""
        if process.phase not in self._working:
            return
        if self._working_since is None:
            self._working_since = process.phase_since
        self._worked_s = process.changed_at - self._working_since
        worked_s = self._worked_before_s + self._worked_s
        self._deaths = [at_s for at_s in self._deaths if worked_s - at_s < self._healthy_after_s]

    def exceeded_memory(self) -> bool:
        """Return whether the present collector, which exceeded the memory limit, had done useful work.

        If not, the caller counts a death with `died`.
        """
        if self._working_since is None:
            return False
        start_s = self._working_since - self._started_at
        return self._worked_s >= min(USEFUL_FACTOR * start_s, self._healthy_after_s)

    def died(self) -> bool:
        """Count a death of the present process. Return whether the budget allows another start."""
        self._deaths.append(self._worked_before_s + self._worked_s)
        return len(self._deaths) <= self._max_restarts


def pause_s(deaths_in_a_row: int, first_s: float) -> float:
    """Return the pause before the next start: 0 after one death, then `first_s`, and each time twice as long.

    deaths_in_a_row: deaths without progress between them, the present one included.
    """
    return 0.0 if deaths_in_a_row < 2 else min(MAX_PAUSE_S, first_s * 2.0 ** min(deaths_in_a_row - 2, 60))
