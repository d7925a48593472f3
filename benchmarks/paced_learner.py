"""The real learner, whose gradient steps a benchmark can pause. Everything else continues.

Run it as `python -m benchmarks.paced_learner --run-dir DIR ...`, like `python -m learner_proc`. While the file
DIR/no_steps exists, it makes no gradient step; it serves the collector like a learner that waits for data. It writes a
line to DIR/ledger.txt every 20 ms: monotonic seconds, gradient steps, agent steps, CPU seconds of this process, and 1
while paused.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from learner_proc import __main__ as entry
from learner_proc import learn, waiting
from shared.process import Process

LEDGER_S = 0.02


class PacedLearner(learn.Learner):
    """Checks for the file every 20 ms, in the call in which the learner shows its status."""

    def __init__(self, process: Process, **parts: Any) -> None:
        super().__init__(process, **parts)
        self._no_steps, self._paused = process.run_dir / "no_steps", False
        self._ledger, self._wrote_at = (process.run_dir / "ledger.txt").open("w", buffering=1), 0.0

    def may_step(self) -> bool:
        """Return whether the learner may make a gradient step now: never while it is paused."""
        return not self._paused and super().may_step()

    def show_status(self) -> None:
        """Show the status; every 20 ms also read the pause file and write a line to the ledger."""
        super().show_status()
        now = time.monotonic()
        if now - self._wrote_at < LEDGER_S:
            return
        self._wrote_at, self._paused = now, self._no_steps.exists()
        steps, frames = self.counters.gradient_steps, self.pacing.collected
        self._ledger.write(f"{now:.4f} {steps} {frames} {time.process_time():.4f} {self._paused:d}\n")


def main() -> int:
    """Run the learner process with the paced learner."""
    waiting.Learner = PacedLearner
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
