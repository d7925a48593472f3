"""The start of a process of a run: what the collector and the learner do alike before they import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import structlog

from shared.compose import load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.lifetime import (
    SaveFlag,
    StopFlag,
    die_with_parent,
    enable_stack_dumps,
    install_stop_flag,
)
from shared.logs import configure
from shared.progress import Progress
from shared.run_folder import Run, read_run


@dataclass(frozen=True)
class Process:
    """What a process of a run has from its start on."""

    run_dir: Path
    settings: Settings
    run: Run
    log: structlog.typing.FilteringBoundLogger
    progress: Progress
    stop: StopFlag
    save: SaveFlag = field(default_factory=SaveFlag)  # the collector has nothing to save and ignores it

    def alive(self) -> None:
        """Report that this process moves. Call it inside a loop that waits. Raises: StopRequested if asked to stop."""
        self.progress.advance()
        self.stop.check()


def start_process(run_dir: Path, name: str) -> Process:
    """Read the run folder, open the log, the progress file and the file for stack dumps, and handle signals.

    From here on the process ends with launch. name: "collector" or "learner".
    Raises: SettingError if the run folder cannot be used; SystemExit if launch has ended already.
    """
    settings, run = load_settings(run_dir / "config.yaml"), read_run(run_dir)
    try:
        log = configure(run_dir, name)
        progress = Progress.create(run_dir / f"{name}.progress")
        enable_stack_dumps(run_dir / "crash", name)
    except OSError as error:
        raise SettingError(
            f"the run folder {run_dir} cannot be used: {error}; expected a folder that launch.py made, in which this "
            "user may write; correct --run-dir"
        ) from error
    stop, save = install_stop_flag(), SaveFlag()
    save.install()
    die_with_parent()
    return Process(run_dir, settings, run, log, progress, stop, save)
