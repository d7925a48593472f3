"""The real collector over a simulator that dies, refuses a setting while it is built, and the third time in mid-run:
`python refusing_collector.py ...`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import collector_proc.__main__ as entry
from collector_proc.simulators import ending
from shared.errors import SettingError, SimulatorError
from shared.progress import read

STEPS = 10  # gradient steps that the learner makes for each incarnation


def fail(simulator: Any, learner: Path, incarnation: int) -> Any:
    step = simulator.step

    def failing_step(action: Any) -> Any:
        if read(learner).status.get("gradient_steps", 0) < STEPS * (incarnation + 1):
            return step(action)
        if incarnation == 0:
            raise SimulatorError("a worker died")
        raise SettingError("env.image_high=1 does not hold the images any more: set it higher")

    simulator.step = failing_step
    return simulator


def main() -> int:
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
