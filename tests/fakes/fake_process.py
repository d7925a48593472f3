"""What a process of a run has from its start on, without files and signals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog

from shared.config import Settings
from shared.lifetime import StopFlag
from shared.metrics import CollectorStatus
from shared.process import Process
from shared.progress import Progress
from shared.run_folder import Run


class FakeProgress:
    """A progress file in memory, which keeps the phases and the last status.

    on_advance: called whenever the process reports that it moves.
    """

    def __init__(self) -> None:
        self.on_advance: Callable[[], None] = lambda: None
        self.phases: list[str] = []
        self.last_status: CollectorStatus | None = None
        self.reason = ""  # of the error that ends the process

    def advance(self) -> None:
        self.on_advance()

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def refuse(self, reason: str) -> None:
        self.reason = reason

    def status(self, status: CollectorStatus) -> None:
        self.last_status = status


def fake_process(settings: Settings, progress: FakeProgress, stop: StopFlag, *, socket_dir: str = "") -> Process:
    """Return a process of the run "run"."""
    run = Run(run_id="run", socket_dir=socket_dir)
    return Process(Path(), settings, run, structlog.get_logger(), cast(Progress, progress), stop)
