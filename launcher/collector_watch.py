"""The watch over the collector. It notices that a collector died and starts the next one, within the restart budget.

Collectors that die in the same way, without a chunk between them, would do so again: the run ends and names the cause.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.child_process import describe_exit
from launcher.children import Starter
from launcher.ending import Outcome
from launcher.learner_watch import same_cause
from launcher.restart_budget import USEFUL_FACTOR, RestartBudget, pause_s
from launcher.watched_process import WatchedProcess
from shared.lifetime import ExitCode
from shared.metrics import CollectorStatus, read_status
from shared.progress import LAST_PHASES, Snapshot

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display
    from launcher.events import Events
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

    def __init__(
        self, starter: Starter, settings: Settings, *, events: Events, log: FilteringBoundLogger, display: Display
    ) -> None:
        self._starter, self._settings, self._events = starter, settings, events
        self._log, self._display = log, display
        collector = settings.collector
        self._budget = RestartBudget(collector.max_restarts, healthy_after_s=collector.healthy_after_s)
        self._death: Death | None = None
        self._restart_at: float | None = None  # set while the next collector has to wait
        self._in_a_row = 0  # deaths without a chunk between them
        self._last_error = ""  # with which the previous collector died
        self.process = self._start()

    @property
    def restarts(self) -> int:
        """How many collectors were started after the first one."""
        return self._starter.restarts

    def observe(self) -> None:
        """Read the collector's progress."""
        self.process.observe()
        self._budget.observe(self.process.snapshot)
        status = read_status(CollectorStatus, self.process.snapshot.status)
        if status is not None and status.chunks > 0:
            self._in_a_row, self._last_error = 0, ""

    def restart(self) -> None:
        """Start the next collector."""
        self._death = self._restart_at = None
        self.process = self._start()

    def check(self, learner: Snapshot, *, watched_since: float) -> Outcome | None:
        """Replace a collector that died or hangs. Return the outcome of the run if it must end, else None."""
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self._restart_dead()
            return None
        if self._death is None:
            how = self._find_death(watched_since)
            if how is None:
                return None
            self._death = Death(time.monotonic(), how)
        if learner.phase in LAST_PHASES or time.monotonic() - self._death.at < GRACE_S:
            return None
        how, self._death = self._death.how, None
        return self._ended(how)

    def _start(self) -> WatchedProcess:
        self._budget.started(at=time.monotonic())
        return WatchedProcess("collector", self._starter, log=self._log, display=self._display)

    def _find_death(self, watched_since: float) -> str | None:
        """Return how the collector ended, or None if it works. A collector that hangs is killed."""
        returncode = self.process.child.poll()
        if returncode is not None:
            return describe_exit(returncode)
        return self.process.kill_if_hung(self._settings.deadlines, watched_since=watched_since)

    def _ended(self, how: str) -> Outcome | None:
        """Replace a collector that has ended. Return the outcome of the run if it must end."""
        code, limit_gb = self.process.child.returncode, self._settings.collector.max_rss_gb
        if code == ExitCode.OUTGROWN and limit_gb is not None:
            return self._replace_outgrown(limit_gb)
        if code == ExitCode.RECYCLED:
            self._events.restart("collector", "it reached collector.recycle_after_hours", planned=True)
            self.restart()
            return None
        self.process.show_death(how)
        if code == ExitCode.REFUSED:
            return Outcome(ExitCode.REFUSED, f"the collector cannot start or continue: {self.process.refusal()}")
        if code == ExitCode.FINISHED:
            how += ", although no process asked it to end: the simulator or its task may have called exit"
        return self._replace_dead(how, cause=self.process.cause())

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
            self._events.restart("collector", "it exceeded collector.max_rss_gb", planned=True)
            self.restart()
            return None
        return self._replace_dead(
            f"it used {used_gb:.2f} GB, more than collector.max_rss_gb={limit_gb:g}, before it had collected for "
            f"{USEFUL_FACTOR} times as long as its start took; set collector.max_rss_gb={2 * used_gb:.1f}, or null for "
            "no limit"
        )

    def _replace_dead(self, how: str, *, cause: str = "") -> Outcome | None:
        """Count a death and plan the next start. Return the outcome of the run if there is none.

        cause: the error of the collector, or the last line of its output, which names the cause in most cases.
        """
        settings, error = self._settings.collector, cause if self.process.child.returncode == ExitCode.FAILED else ""
        again, self._last_error = bool(error) and same_cause(error, self._last_error), error
        named = f", after the output: {cause}" if cause else ""
        allowed, reason = self._budget.died(), ""
        if again:
            reason = (
                f"two collectors died in the same way ({how}{named}), and no chunk was collected between them; "
                "expected a failure that does not repeat itself; fix the cause in logs/collector.out"
            )
        elif not allowed:
            reason = (
                f"collector died {self._budget.deaths} times (the last time: {how}{named}) within "
                f"collector.healthy_after_s={settings.healthy_after_s:g} s of collecting; expected at most "
                f"collector.max_restarts={settings.max_restarts} such deaths; fix the cause in logs/collector.out, or "
                "raise collector.max_restarts"
            )
        if reason:
            self._log.error(reason)
            return Outcome(ExitCode.FAILED, reason)
        self._in_a_row += 1
        pause = pause_s(self._in_a_row, self._settings.supervision.backoff_s)
        self._events.restart("collector", how + named)
        if pause:
            self._log.warning("the next collector starts after a pause", pause_s=pause)
            self._restart_at = time.monotonic() + pause
            return None
        self._restart_dead()
        return None

    def _restart_dead(self) -> None:
        """Start the next collector after a death."""
        self.restart()
        self._log.warning(
            "the collector was restarted",
            incarnation=self._starter.restarts,
            deaths=self._budget.deaths,
            max_restarts=self._settings.collector.max_restarts,
        )
