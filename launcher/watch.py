"""The watch over both processes: deaths, hangs, restarts, an orderly end, and what goes out of the run meanwhile.

learner ends with 0        -> finished: the collector is stopped, exit 0
learner ends otherwise     -> the collector is stopped, exit 1 (2 if it refused a setting or checkpoint)
collector ends with 2      -> it cannot work as it is set: the learner is asked to save and end, exit 2
collector ends or hangs    -> the next incarnation within collector.max_restarts; the learner goes on meanwhile;
                              forgotten after collector.healthy_after_s of collecting without another death
collector outgrew          -> it held more than collector.max_rss_gb: the next incarnation; a death like any other unless
                              it had collected for ten times as long as its start took, or for collector.healthy_after_s
first Ctrl-C or SIGTERM    -> the learner is asked to save and end, then the collector is stopped, exit 130 or 143
second one                 -> both are killed at once
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.budget import USEFUL, RestartBudget
from launcher.child_process import ChildProcess
from launcher.children import Starter, describe_exit
from launcher.forwarding import MetricsTail, last_row
from shared.lifetime import ExitCode, StopFlag
from shared.metrics import GRADIENT_STEPS, STARTUP_S, CollectorStatus, read_status
from shared.progress import LAST_PHASES, Snapshot, overdue_s, read

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display
    from launcher.forwarding import Forwarder
    from shared.config import Settings

TICK_S = 0.2
PHASES_BEFORE_TRAINING = ("starting", "hello", "compiling")  # of the learner
UNTRAINED_S = 5.0
SLEPT_S = 5.0  # a pass later than this means that this process, or the whole machine, was suspended
# A collector that lost its learner ends first; this long the learner may follow before that counts as a death.
GRACE_S = 0.6


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    reason: str


class Watch:
    """One run from the first start to the last reap. `restarts` counts the collectors started again, for whatever reason."""

    def __init__(
        self,
        starter: Starter,
        settings: Settings,
        *,
        stop: StopFlag,
        log: FilteringBoundLogger,
        display: Display,
        forwarder: Forwarder,
    ) -> None:
        self._starter, self._settings, self._stop = starter, settings, stop
        self._log, self._display, self._forwarder = log, display, forwarder
        self._tail = MetricsTail(starter.folder.metrics, log)
        self._row: dict[str, Any] = last_row(starter.folder.metrics)
        self._children: dict[str, ChildProcess] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._ending: tuple[Outcome, float] | None = None  # asked the learner to end, with this deadline
        self._collector_died_at: float | None = None
        self._collector_death = ""
        collector = settings.collector
        self._budget = RestartBudget(collector.max_restarts, healthy_after_s=collector.healthy_after_s)
        self._watched_since = self._passed_at = time.monotonic()
        self._said_ready = False
        self.restarts = 0
        self.num_rows = 0  # of metrics.jsonl, written by this launch's learner

    def run(self) -> Outcome:
        """Start both processes, watch until the run is over, and leave none of them behind."""
        try:
            self._start("learner")
            self._start("collector")
            while True:
                self._observe()
                outcome = self._check_signals() or self._check_learner() or self._check_collector()
                if outcome is not None:
                    break
                time.sleep(TICK_S)
            self._end_collector()
            return outcome
        finally:
            for child in self._children.values():
                child.kill()
            self._forward_rows()

    def _start(self, role: str) -> None:
        if role == "collector":
            self._budget.started(at=time.monotonic())
        child = self._starter.start(role, self.restarts if role == "collector" else 0)
        self._children[role] = child
        self._log.info("started", role=role, pid=child.pid, incarnation=self.restarts, command=child.command)

    def _observe(self) -> None:
        now = time.monotonic()
        if now - self._passed_at > SLEPT_S:
            self._watched_since = now
        self._passed_at = now
        self._snapshots = {role: read(self._starter.folder.progress(role)) for role in self._children}
        self._budget.observe(self._snapshots["collector"])
        self._forward_rows()
        self._display.show(self._snapshots["learner"], self._snapshots["collector"], self._row, restarts=self.restarts)

    def _forward_rows(self) -> None:
        for row in self._tail.new_rows():
            startup_s = STARTUP_S.of(row)
            if self._settings.optimization.compile.enabled and not self._said_ready and startup_s is not None:
                self._display.say(f"networks were built and compiled in {startup_s:.1f} s")
                self._said_ready = True
            self._row = row
            self.num_rows += 1
            self._forwarder.add(row)

    def _check_signals(self) -> Outcome | None:
        if not self._stop.requested:
            return None
        assert self._stop.signum is not None
        name, code = signal.Signals(self._stop.signum).name, 128 + self._stop.signum
        if self._hurry():
            self._log.warning("second signal: both processes are killed, nothing more is saved")
            return Outcome(code, f"interrupted by {name}, then killed by a second signal")
        if self._ending is None:
            self._display.say("stopping: the learner saves what it has trained; once more kills both at once")
            self._end_learner(Outcome(code, f"interrupted by {name}"))
        return None

    def _hurry(self) -> bool:
        return self._stop.count >= 2

    def _end_learner(self, outcome: Outcome) -> None:
        """Ask it to save and end; before it has trained there is nothing to save, and a compiler cannot be asked."""
        phase = self._snapshots["learner"].phase
        self._log.info("asking the learner to save and end", reason=outcome.reason, phase=phase)
        patience = self._settings.deadlines.save_s
        if phase in PHASES_BEFORE_TRAINING:
            patience = UNTRAINED_S
            if outcome.exit_code != 2:  # whose reason is a whole sentence of what is wrong and how to mend it
                outcome = Outcome(outcome.exit_code, f"{outcome.reason} before training began")
        self._ending = (outcome, time.monotonic() + patience)
        self._children["learner"].terminate()

    def _check_learner(self) -> Outcome | None:
        learner = self._children["learner"]
        returncode = learner.poll()
        if returncode is None:
            return self._check_running_learner(learner)
        if self._ending is not None:
            planned = self._ending[0]
            if returncode in (0, -signal.SIGTERM):  # the latter: asked before it had come as far as the handler
                return planned
            self._show_death(learner, describe_exit(returncode))
            return Outcome(planned.exit_code, f"{planned.reason}; the learner then died ({describe_exit(returncode)})")
        if returncode == 0:
            return self._finished()
        self._show_death(learner, describe_exit(returncode))
        if returncode == ExitCode.REFUSED:
            said = self._refusal("learner")
            return Outcome(2, f"the learner cannot start or go on: {said}")
        return Outcome(1, f"learner died ({describe_exit(returncode)})")

    def _finished(self) -> Outcome:
        self._forward_rows()
        steps, total = GRADIENT_STEPS.of(self._row), self._settings.optimization.total_optim_steps
        if steps is not None and steps < total:
            return Outcome(0, f"learner was asked to end from outside after {steps} of {total} gradient steps")
        return Outcome(0, "finished")

    def _check_running_learner(self, learner: ChildProcess) -> Outcome | None:
        if self._ending is not None:
            outcome, deadline = self._ending
            if time.monotonic() < deadline:
                return None
            if self._snapshots["learner"].phase in PHASES_BEFORE_TRAINING:
                learner.kill()
                return outcome
            waited = f"the learner did not end within deadlines.save_s={self._settings.deadlines.save_s:g} s"
            self._log.error(f"{waited}; it is killed", pid=learner.pid)
            learner.dump_stacks()
            learner.kill()
            return Outcome(outcome.exit_code, f"{outcome.reason}; {waited} and was killed")
        hang = self._hang(learner)
        if hang is None:
            return None
        self._show_death(learner, hang)
        return Outcome(1, f"learner died ({hang})")

    def _check_collector(self) -> Outcome | None:
        collector = self._children["collector"]
        if self._ending is not None:
            collector.poll()
            return None
        if self._collector_died_at is None:
            returncode = collector.poll()
            hang = self._hang(collector) if returncode is None else None
            if returncode is None and hang is None:
                return None
            self._collector_died_at = time.monotonic()
            self._collector_death = hang or describe_exit(returncode)
            if returncode == ExitCode.REFUSED:
                self._show_death(collector, self._collector_death)
                said = self._refusal("collector")
                self._end_learner(Outcome(2, f"the collector cannot start or go on: {said}"))
                return None
        if self._snapshots["learner"].phase in LAST_PHASES or time.monotonic() - self._collector_died_at < GRACE_S:
            return None
        self._collector_died_at = None
        if collector.returncode == ExitCode.OUTGROWN and self._settings.collector.max_rss_gb is not None:
            self._replace_outgrown(self._settings.collector.max_rss_gb)
            return None
        self._show_death(collector, self._collector_death)
        self._restart_collector()
        return None

    def _replace_outgrown(self, limit_gb: float) -> None:
        status = read_status(CollectorStatus, self._snapshots["collector"].status)
        held_gb, excused = limit_gb if status is None else status.rss_gb, self._budget.excuses()
        self._log.warning(
            "collector outgrew collector.max_rss_gb", held_gb=held_gb, limit_gb=limit_gb, counts_as_death=not excused
        )
        if excused:
            self._start_next_collector()
            return
        self._collector_death = (
            f"holding {held_gb:.2f} GB, more than collector.max_rss_gb={limit_gb:g}, before it had collected for "
            f"{USEFUL} times as long as its start took; set collector.max_rss_gb={2 * held_gb:.1f}, or null for no limit"
        )
        self._restart_collector()

    def _restart_collector(self) -> None:
        settings = self._settings.collector
        if not self._budget.allows_another():
            reason = (
                f"collector died {self._budget.deaths} times, the last time by {self._collector_death}; between "
                f"two deaths it never collected for collector.healthy_after_s={settings.healthy_after_s:g} s; "
                f"collector.max_restarts={settings.max_restarts} allows no further start"
            )
            self._log.error(reason)
            self._end_learner(Outcome(1, reason))
            return
        self._start_next_collector()
        self._log.warning(
            "collector started again",
            incarnation=self.restarts,
            deaths=self._budget.deaths,
            budget=settings.max_restarts,
        )

    def _start_next_collector(self) -> None:
        self.restarts += 1
        self._start("collector")

    def _hang(self, child: ChildProcess) -> str | None:
        """What it hung in, once its counter stood still for longer than its phase allows; it is dead then."""
        seen = self._snapshots[child.name]
        late = overdue_s(seen, self._settings.deadlines, now=time.monotonic(), watched_since=self._watched_since)
        if late is None:
            return None
        still_s = time.monotonic() - seen.changed_at
        what = f"hung in phase {seen.phase}: no progress for {still_s:.1f} s at count {seen.counter}"
        self._log.error(f"{child.name} {what}; it is killed", pid=child.pid, stacks=f"crash/{child.name}.stacks")
        child.dump_stacks()
        if child.kill() is None:
            self._log.error("SIGKILL did not end it within 30 s; look for a stuck driver", pid=child.pid)
        return what

    def _refusal(self, role: str) -> str:
        """Return why a process that has ended could not work, as it wrote in its progress file."""
        return read(self._starter.folder.progress(role)).refusal or "the lines above say why"

    def _show_death(self, child: ChildProcess, how: str) -> None:
        self._log.error(f"{child.name} died ({how}); the last lines of logs/{child.name}.out:", pid=child.pid)
        for line in child.last_output():
            self._display.say(f"  {child.name}> {line}")

    def _end_collector(self) -> None:
        collector = self._children["collector"]
        if collector.poll() is None:
            returncode = collector.stop(self._settings.deadlines.stop_s, hurry=self._hurry)
            self._log.info("collector stopped", how=describe_exit(returncode))
