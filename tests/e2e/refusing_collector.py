"""The real collector with a simulator that fails in a different way in each incarnation.

    incarnation 0   it dies while it runs
    incarnation 1   it refuses a setting while it is built
    incarnation 2   it refuses a setting while it runs

Run as `python refusing_collector.py --run-dir DIR ...`, like `python -m collector_proc`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import collector_proc.__main__ as entry
from collector_proc.simulators import ending
from shared.errors import SettingError, SimulatorError
from shared.progress import read

STEPS = 10  # gradient steps that are made with each incarnation before it fails


def fail(simulator: Any, learner: Path, incarnation: int) -> Any:
    """Return the simulator; it fails once the learner has made STEPS more steps. learner: its progress file."""
    step = simulator.step

    def failing_step(action: Any) -> Any:
        if read(learner).status.get("gradient_steps", 0) < STEPS * (incarnation + 1):
            return step(action)
        if incarnation == 0:
            raise SimulatorError("a worker died")
        raise SettingError("env.image_high=1 is too low for the images; set it higher")

    simulator.step = failing_step
    return simulator


def main() -> int:
    """Run the collector."""
    build, incarnation = entry.build_simulator, int(sys.argv[sys.argv.index("--incarnation") + 1])

    def build_failing(*args: Any, crash_dir: Path, **options: Any) -> Any:
        if incarnation == 1:
            raise SettingError("env.name=my_envs:make does not import: SyntaxError: it is being edited")
        made = build(*args, crash_dir=crash_dir, **options)
        return fail(made, crash_dir.parent / "learner.progress", incarnation)

    entry.build_simulator = build_failing
    return entry.main()


if __name__ == "__main__":
    ending.run(main)
