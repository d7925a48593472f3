"""The watch over the collector. It notices that a collector died and starts the next one, within the restart budget."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.child_process import describe_exit
from launcher.children import Starter
from launcher.ending import Outcome
from launcher.restart_budget import USEFUL_FACTOR, RestartBudget
from launcher.watched_process import WatchedProcess
from shared.lifetime import ExitCode
from shared.metrics import CollectorStatus, read_status
from shared.progress import LAST_PHASES, Snapshot

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display
    from shared.config import Settings

# A collector ends when its learner ends, and launch may notice the collector's end first. So an end counts as a death
# only after this time.
GRACE_S = 0.6


@dataclass(frozen=True)
class Death:
    """When and how a collector ended."""

    at: float  # time.monotonic() seconds
    how: str


class CollectorWatch:
    """Keeps a collector running. `process` is the present incarnation."""

    def __init__(self, starter: Starter, settings: Settings, *, log: FilteringBoundLogger, display: Display) -> None:
        self._starter, self._settings, self._log, self._display = starter, settings, log, display
        collector = settings.collector
        self._budget = RestartBudget(collector.max_restarts, healthy_after_s=collector.healthy_after_s)
        self._death: Death | None = None
        self.process = self._start()

    @property
    def restarts(self) -> int:
        """How many collectors were started after the first one."""
        return self._starter.restarts

    def observe(self) -> None:
        """Read the collector's progress."""
        self.process.observe()
        self._budget.observe(self.process.snapshot)

    def check(self, learner: Snapshot, *, watched_since: float) -> Outcome | None:
        """Replace a collector that died or hangs. Return the outcome of the run if it must end, else None."""
        if self._death is None:
            how = self._find_death(watched_since)
            if how is None:
                return None
            self._death = Death(time.monotonic(), how)
            if self.process.child.returncode == ExitCode.REFUSED:
                self.process.show_death(how)
                return Outcome(ExitCode.REFUSED, f"the collector cannot start or continue: {self.process.refusal()}")
        if learner.phase in LAST_PHASES or time.monotonic() - self._death.at < GRACE_S:
            return None
        how, self._death = self._death.how, None
        limit_gb = self._settings.collector.max_rss_gb
        if self.process.child.returncode == ExitCode.OUTGROWN and limit_gb is not None:
            return self._replace_outgrown(limit_gb)
        self.process.show_death(how)
        if self.process.child.returncode == ExitCode.FINISHED:
            how += ", although no process asked it to end: the simulator or its task may have called exit"
        return self._replace_dead(how, last_line=self.process.last_line())

    def _start(self) -> WatchedProcess:
        self._budget.started(at=time.monotonic())
        return WatchedProcess("collector", self._starter, log=self._log, display=self._display)

    def _find_death(self, watched_since: float) -> str | None:
        """Return how the collector ended, or None if it works. A collector that hangs is killed."""
        returncode = self.process.child.poll()
        if returncode is not None:
            return describe_exit(returncode)
        return self.process.kill_if_hung(self._settings.deadlines, watched_since=watched_since)

    def _replace_outgrown(self, limit_gb: float) -> Outcome | None:
        """Start the next collector after one that used too much memory, which may count as a death."""
        status = read_status(CollectorStatus, self.process.snapshot.status)
        used_gb = limit_gb if status is None else status.rss_gb
        useful = self._budget.exceeded_memory()
        self._log.warning(
            "the collector used more memory than collector.max_rss_gb",
            used_gb=used_gb,
            limit_gb=limit_gb,
            counts_as_death=not useful,
        )
        if useful:
            self.process = self._start()
            return None
        return self._replace_dead(
            f"it used {used_gb:.2f} GB, more than collector.max_rss_gb={limit_gb:g}, before it had collected for "
            f"{USEFUL_FACTOR} times as long as its start took; set collector.max_rss_gb={2 * used_gb:.1f}, or null for "
            "no limit"
        )

    def _replace_dead(self, how: str, *, last_line: str = "") -> Outcome | None:
        """Count a death and start the next collector. Return the outcome of the run if the budget is used up.

        last_line: the last line of the collector's output, which names the cause in most cases.
        """
        settings = self._settings.collector
        if not self._budget.died():
            cause = f", after the output: {last_line:.500}" if last_line else ""
            reason = (
                f"collector died {self._budget.deaths} times (the last time: {how}{cause}) and never collected for "
                f"collector.healthy_after_s={settings.healthy_after_s:g} s in between; expected at most "
                f"collector.max_restarts={settings.max_restarts} such deaths; fix the cause in logs/collector.out, or "
                "raise collector.max_restarts"
            )
            self._log.error(reason)
            return Outcome(ExitCode.FAILED, reason)
        self.process = self._start()
        self._log.warning(
            "the collector was restarted",
            incarnation=self._starter.restarts,
            deaths=self._budget.deaths,
            max_restarts=settings.max_restarts,
        )
        return None
