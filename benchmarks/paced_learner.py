"""The real learner, which a benchmark may tell to stop and resume its gradient steps. Everything else goes on.

Run as `python -m benchmarks.paced_learner --run-dir DIR ...`, like `python -m learner_proc`. While DIR/no_steps exists it
makes no gradient step: it serves the collector like a learner that waits. DIR/ledger.txt gets a line every 20 ms:
monotonic seconds, gradient steps, agent steps, CPU seconds of this process, 1 while it makes no steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from learner_proc import __main__ as entry
from learner_proc import learn

LEDGER_S = 0.02


class PacedLearner(learn.Learner):
    """Looks for the file once every 20 ms, where the learner shows its status anyway."""

    def __init__(self, *args, run_dir: Path, **kwargs) -> None:
        super().__init__(*args, run_dir=run_dir, **kwargs)
        self._no_steps, self._paused = run_dir / "no_steps", False
        self._ledger, self._wrote_at = (run_dir / "ledger.txt").open("w", buffering=1), 0.0

    def _may_step(self) -> bool:
        return not self._paused and super()._may_step()

    def _show_status(self) -> None:
        super()._show_status()
        now = time.monotonic()
        if now - self._wrote_at < LEDGER_S:
            return
        self._wrote_at, self._paused = now, self._no_steps.exists()
        steps, frames = self.counters.gradient_steps, self._pacing.collected
        self._ledger.write(f"{now:.4f} {steps} {frames} {time.process_time():.4f} {self._paused:d}\n")


def main() -> int:
    learn.Learner = PacedLearner
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
