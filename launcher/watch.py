"""The watch over both processes, from their start to the end of the run. Torch-free.

event                                  reaction
the learner ends with all steps done   the collector is stopped; exit code 0
the learner ends otherwise or hangs    the collector is stopped, and both start again from the newest checkpoint, within
                                       a budget (launcher/learner_watch.py); beyond it, exit code 1
the learner refuses to work            the collector is stopped; exit code 2
the collector dies or hangs            it is restarted within its budget (launcher/restart_budget.py)
the collector used too much memory     it is restarted; this may count as a death (launcher/restart_budget.py)
the collector reached its age          it is restarted
the collector died too often, or       the learner saves and ends; exit code 1
twice in the same way without a chunk
the collector refuses to work          the learner saves and ends; exit code 2
Ctrl-C, SIGTERM, SIGHUP or SIGUSR1     the learner saves and ends, then the collector is stopped; exit code 130, 143,
                                       129 (SIGHUP: the terminal was closed) or 138
a second Ctrl-C or SIGTERM             both are killed at once
SIGUSR2                                the learner saves and goes on
an error of launch itself              the learner saves and ends, then the collector is killed; exit code 1
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from launcher.child_process import describe_exit
from launcher.children import Starter
from launcher.collector_watch import CollectorWatch
from launcher.ending import OrderlyEnd, Outcome
from launcher.learner_watch import LearnerWatch
from shared.lifetime import ExitCode, SaveFlag, StopFlag
from shared.metrics import STARTUP_S

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display
    from launcher.forwarding import RowRelay
    from launcher.reports import Reports
    from shared.config import Settings

TICK_S = 0.2
SUSPENDED_S = 5.0  # a pass that is later than this was delayed, for example by a suspended machine


def run_processes(
    starter: Starter,
    settings: Settings,
    *,
    stop: StopFlag,
    save: SaveFlag,
    reports: Reports,
    log: FilteringBoundLogger,
    display: Display,
    relay: RowRelay,
) -> Outcome:
    """Start the learner and the collector, watch them until the run is over, and leave neither of them behind."""
    try:
        try:
            learner = LearnerWatch(starter, settings, relay=relay, events=reports.events, log=log, display=display)
            collector = CollectorWatch(starter, settings, events=reports.events, log=log, display=display)
        except OSError as error:
            return Outcome(
                ExitCode.REFUSED,
                f"the two processes cannot be started: {error}; expected a run folder in which this user may write, on "
                "a disk with free space; correct this, or give another --run-dir",
            )
        watch = Watch(
            learner, collector, settings, stop=stop, save=save, reports=reports, log=log, display=display, relay=relay
        )
        try:
            outcome = watch.run()
            watch.stop_collector()
        except Exception as error:  # of launch itself: the learner can still save what it has learned
            if starter.folder.path.is_dir():
                watch.end_after_error(error)
            raise
        return outcome
    finally:
        starter.kill_all()
        relay.forward()


class Watch:
    """Watches a started learner and collector until the run is over."""

    def __init__(
        self,
        learner: LearnerWatch,
        collector: CollectorWatch,
        settings: Settings,
        *,
        stop: StopFlag,
        save: SaveFlag,
        reports: Reports,
        log: FilteringBoundLogger,
        display: Display,
        relay: RowRelay,
    ) -> None:
        self._learner, self._collector, self._settings = learner, collector, settings
        self._stop, self._save, self._reports = stop, save, reports
        self._log, self._display, self._relay = log, display, relay
        self._end: OrderlyEnd | None = None  # set as soon as the run is to end in order
        self._watched_since = self._passed_at = time.monotonic()
        self._start_shown = False

    def run(self) -> Outcome:
        """Watch until the run is over; the collector may still run then."""
        while True:
            self._observe()
            outcome = self._check_signals() or self._check_learner()
            if outcome is not None:
                return outcome
            self._check_collector()
            time.sleep(TICK_S)

    def stop_collector(self) -> None:
        """Ask the collector to end, and kill it if it does not end in time or the user is impatient."""
        child = self._collector.process.child
        if child.poll() is None:
            returncode = child.stop(self._settings.deadlines.stop_s, give_up=self._is_impatient)
            self._log.info("collector stopped", how=describe_exit(returncode))

    def end_after_error(self, error: Exception) -> None:
        """Let the learner save and end after an error of launch. A second signal of the user kills it."""
        end = self._end or OrderlyEnd(
            Outcome(ExitCode.FAILED, f"launch failed: {error!r}"),
            self._learner.process,
            self._settings.deadlines,
            self._log,
        )
        while end.check() is None and not self._is_impatient():
            time.sleep(TICK_S)

    def _observe(self) -> None:
        """Read the progress of both processes and the new metrics rows, and show them."""
        now = time.monotonic()
        if now - self._passed_at > SUSPENDED_S:
            self._watched_since = now
        self._passed_at = now
        self._learner.observe()
        self._collector.observe()
        self._forward_rows()
        seen = self._learner.process.snapshot, self._collector.process.snapshot, self._relay.newest
        self._display.show(*seen, restarts=self._collector.restarts)
        self._reports.update(*seen)

    def _forward_rows(self) -> None:
        for row in self._relay.forward():
            startup_s = STARTUP_S.of(row)
            if self._settings.optimization.compile.enabled and not self._start_shown and startup_s is not None:
                self._display.print_line(f"networks were built and compiled in {startup_s:.1f} s")
                self._start_shown = True

    def _check_signals(self) -> Outcome | None:
        """Begin an orderly end at the first signal. Return the outcome at the second one."""
        if self._save.take() and not self._stop.requested:
            self._log.info("SIGUSR2: asking the learner to save", phase=self._learner.process.snapshot.phase)
            self._learner.process.child.ask_to_save()
        if not self._stop.requested:
            return None
        assert self._stop.signum is not None
        name, code = signal.Signals(self._stop.signum).name, 128 + self._stop.signum
        if self._is_impatient():
            self._log.warning("second signal: both processes are killed, nothing more is saved")
            return Outcome(code, f"interrupted by {name}, then killed by a second signal")
        if self._learner.is_down:
            return Outcome(code, f"interrupted by {name} while no learner ran")
        if self._end is None:
            self._display.print_line("stopping: the learner saves a checkpoint; a second Ctrl-C kills both processes")
            self._end_in_order(Outcome(code, f"interrupted by {name}"))
        return None

    def _is_impatient(self) -> bool:
        """Return whether a Ctrl-C or SIGTERM came while the run was already ending because of another one."""
        return self._stop.count >= 2

    def _end_in_order(self, outcome: Outcome) -> None:
        self._end = OrderlyEnd(outcome, self._learner.process, self._settings.deadlines, self._log)

    def _check_learner(self) -> Outcome | None:
        """Return the outcome of the run if the learner has ended or hangs and is not replaced."""
        if self._end is not None:
            return self._end.check()
        if self._learner.is_down:
            if self._learner.is_due:
                self._learner.restart()
                self._collector.restart()
            return None
        self._forward_rows()  # the last rows of a learner that has ended
        outcome = self._learner.check(watched_since=self._watched_since)
        if self._learner.is_down:
            self.stop_collector()
        return outcome

    def _check_collector(self) -> None:
        """Replace a dead collector. Begin an orderly end if it cannot be replaced."""
        if self._end is not None:
            self._collector.process.child.poll()
            return
        if self._learner.is_down:
            return
        outcome = self._collector.check(self._learner.process.snapshot, watched_since=self._watched_since)
        if outcome is not None:
            self._end_in_order(outcome)
