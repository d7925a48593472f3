"""How a run ends: its outcome, and the orderly end in which the learner saves a checkpoint first."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.child_process import describe_exit
from launcher.watched_process import WatchedProcess
from shared.config import DeadlineSettings
from shared.lifetime import ExitCode

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

PHASES_BEFORE_TRAINING = ("starting", "resuming", "hello", "compiling")  # of the learner
UNTRAINED_S = 5.0  # how long a learner that has not trained may take to end: it has nothing to save


@dataclass(frozen=True)
class Outcome:
    """How the run ended: the exit code of launch, and the reason for the summary and the user."""

    exit_code: int
    reason: str


class OrderlyEnd:
    """The learner was asked to save and to end, and has until a deadline to do so. Creating the object asks it."""

    def __init__(
        self, outcome: Outcome, learner: WatchedProcess, deadlines: DeadlineSettings, log: FilteringBoundLogger
    ) -> None:
        phase = learner.snapshot.phase
        log.info("asking the learner to save and end", reason=outcome.reason, phase=phase)
        allowed_s, limit = deadlines.save_s, f"deadlines.save_s={deadlines.save_s:g} s"
        if phase in PHASES_BEFORE_TRAINING:
            allowed_s, limit = UNTRAINED_S, f"{UNTRAINED_S:g} s"
            if outcome.exit_code != ExitCode.REFUSED:  # a refusal is an error message, complete as it is
                outcome = Outcome(outcome.exit_code, f"{outcome.reason} before training began")
        self._outcome, self._learner, self._log = outcome, learner, log
        self._limit, self._deadline = limit, time.monotonic() + allowed_s
        learner.child.terminate()

    def check(self) -> Outcome | None:
        """Return the outcome of the run once the learner has ended; after the deadline, kill it first."""
        returncode = self._learner.child.poll()
        if returncode is not None:
            return self._ended(returncode)
        return None if time.monotonic() < self._deadline else self._kill()

    def _ended(self, returncode: int) -> Outcome:
        # SIGTERM ends a learner that was asked before it had installed its handler.
        if returncode in (ExitCode.FINISHED, -signal.SIGTERM):
            return self._outcome
        how = describe_exit(returncode)
        self._learner.show_death(how)
        return Outcome(self._outcome.exit_code, f"{self._outcome.reason}; the learner then died ({how})")

    def _kill(self) -> Outcome:
        if self._learner.snapshot.phase in PHASES_BEFORE_TRAINING:
            self._learner.child.kill()
            return self._outcome
        late = f"the learner did not end within {self._limit}"
        self._log.error(f"{late}; it is killed", pid=self._learner.child.pid)
        self._learner.child.dump_stacks()
        self._learner.child.kill()
        return Outcome(self._outcome.exit_code, f"{self._outcome.reason}; {late} and was killed")
