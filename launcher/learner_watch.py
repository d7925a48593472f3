"""The watch over the learner. A learner that died or hangs is replaced from the newest checkpoint, within a budget.

The run ends, and names the cause, if the budget is used up, if the learner refuses to work, if two learners die in the
same way and the second one made no later gradient step, or if a second one dies before there is a checkpoint.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.child_process import describe_exit
from launcher.children import Starter
from launcher.ending import Outcome
from launcher.restart_budget import TRAINING_PHASES, TRAINING_WINDOW_S, RestartBudget, pause_s
from launcher.watched_process import WatchedProcess
from shared.checkpoints import newest_checkpoint, settle
from shared.lifetime import ExitCode
from shared.metrics import GRADIENT_STEPS, LearnerStatus, read_status
from shared.run_folder import read_run
from shared.socket_folder import make_room_for_sockets

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.display import Display
    from launcher.events import Events
    from launcher.forwarding import RowRelay
    from shared.config import Settings


@dataclass(frozen=True)
class Death:
    """How a learner ended, and how many gradient steps it had made."""

    how: str
    steps: int

    def repeats(self, earlier: Death | None) -> bool:
        """Return whether this is the earlier death again, and no later gradient step was made. Numbers may differ."""
        return earlier is not None and self.steps <= earlier.steps and same_cause(self.how, earlier.how)


def same_cause(one: str, other: str) -> bool:
    """Return whether two descriptions of a failure differ at most in their numbers."""
    return re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", other)


class LearnerWatch:
    """Keeps a learner running. `process` is the present one. `restarts` counts those that followed the first one."""

    def __init__(
        self,
        starter: Starter,
        settings: Settings,
        *,
        relay: RowRelay,
        events: Events,
        log: FilteringBoundLogger,
        display: Display,
    ) -> None:
        self._starter, self._settings, self._relay, self._events = starter, settings, relay, events
        self._log, self._display = log, display
        limit = settings.supervision.max_learner_restarts
        self._budget = RestartBudget(limit, healthy_after_s=TRAINING_WINDOW_S, working=TRAINING_PHASES)
        self._last_death: Death | None = None
        self._in_a_row = 0  # deaths without a later gradient step between them
        self._begun_again = False  # a learner died before there was a checkpoint
        self._restart_at: float | None = None  # set while there is no learner
        self.restarts = 0
        self.process = self._start()

    @property
    def is_down(self) -> bool:
        """Whether the learner has died and the next one is not started yet."""
        return self._restart_at is not None

    @property
    def is_due(self) -> bool:
        """Whether it is time to start the next learner."""
        return self._restart_at is not None and time.monotonic() >= self._restart_at

    def observe(self) -> None:
        """Read the learner's progress."""
        if not self.is_down:
            self.process.observe()
            self._budget.observe(self.process.snapshot)

    def restart(self) -> None:
        """Start the next learner, from the newest checkpoint if there is one."""
        self._restart_at = None
        self.restarts += 1
        with suppress(OSError):
            settle(self._starter.folder.checkpoints)  # a learner that died while it saved may have left a part
        make_room_for_sockets(Path(read_run(self._starter.folder.path).socket_dir))
        self.process = self._start()
        saved = newest_checkpoint(self._starter.folder.checkpoints)
        start = "from the start" if saved is None else f"from step {saved.manifest.step:,}"
        self._log.warning(f"the learner was restarted {start}", restarts=self.restarts, deaths=self._budget.deaths)

    def check(self, *, watched_since: float) -> Outcome | None:
        """Return the outcome of the run if the learner has ended and is not replaced. Otherwise see `is_down`."""
        returncode, total = self.process.child.poll(), self._settings.optimization.total_optim_steps
        if returncode == ExitCode.FINISHED and self.steps_done() >= total:
            return Outcome(ExitCode.FINISHED, "finished")
        how = self._find_death(returncode, watched_since)
        if how is None:
            return None
        self.process.show_death(how)
        if self._steps_saved() >= total:  # it died after its work was done
            return Outcome(ExitCode.FINISHED, f"finished; the learner then died ({how})")
        if returncode == ExitCode.REFUSED:
            return Outcome(ExitCode.REFUSED, f"the learner cannot start or continue: {self.process.refusal()}")
        cause = self.process.cause()
        return self._died(Death(f"{how}: {cause}" if cause else how, self._steps_made()))

    def steps_done(self) -> int:
        """Return the largest number of gradient steps that a checkpoint, a row or the status of this launch shows."""
        rows = GRADIENT_STEPS.of(self._relay.newest) if self._relay.num_rows else None
        return max(self._steps_saved(), int(rows or 0), self._steps_made())

    def _steps_saved(self) -> int:
        saved = newest_checkpoint(self._starter.folder.checkpoints)
        return 0 if saved is None else saved.manifest.step

    def _start(self) -> WatchedProcess:
        self._budget.started(at=time.monotonic())
        return WatchedProcess("learner", self._starter, log=self._log, display=self._display)

    def _find_death(self, returncode: int | None, watched_since: float) -> str | None:
        """Return how the learner ended, or None if it works. A learner that hangs is killed."""
        if returncode is None:
            return self.process.kill_if_hung(self._settings.deadlines, watched_since=watched_since)
        if returncode != ExitCode.FINISHED:
            return describe_exit(returncode)
        total = self._settings.optimization.total_optim_steps
        return f"it ended by itself after {self.steps_done()} of {total} gradient steps, probably because of a signal"

    def _steps_made(self) -> int:
        """Return the gradient steps that the present learner reported last."""
        status = read_status(LearnerStatus, self.process.snapshot.status)
        return status.gradient_steps if status is not None else 0

    def _died(self, death: Death) -> Outcome | None:
        """Plan the next start. Return the outcome of the run if there is none."""
        earlier, self._last_death = self._last_death, death
        progressed = earlier is None or death.steps > earlier.steps
        self._in_a_row = 1 if progressed else self._in_a_row + 1
        limit, allowed = self._settings.supervision.max_learner_restarts, self._budget.died()
        without = newest_checkpoint(self._starter.folder.checkpoints) is None
        reason = f"learner died ({death.how})"
        if death.repeats(earlier):
            reason += (
                f" twice, and no gradient step after step {earlier.steps if earlier else 0} was made between the two "
                "deaths; expected progress; fix the cause in logs/learner.out, then continue with --resume"
            )
        elif without and self._begun_again:
            reason += (
                ", as an earlier one did in another way, and there is no checkpoint; expected one to continue from; "
                "fix the cause in logs/learner.out, or lower checkpoint.every_s"
            )
        elif limit > 0 and not allowed:
            reason += (
                f", the last of {self._budget.deaths} deaths within an hour of training; expected at most "
                f"supervision.max_learner_restarts={limit}; fix the cause in logs/learner.out, or raise it"
            )
        elif allowed:
            self._begun_again = self._begun_again or without
            return self._replace(death.how)
        return Outcome(ExitCode.FAILED, reason)

    def _replace(self, cause: str) -> None:
        """Let the next learner start after a pause."""
        pause = pause_s(self._in_a_row, self._settings.supervision.backoff_s)
        self._restart_at = time.monotonic() + pause
        self._events.restart("learner", cause, step=self._steps_made())
        self._log.warning("the learner is restarted from the newest checkpoint", cause=cause, pause_s=pause)
