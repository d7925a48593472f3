"""A progress file that exists only in memory."""

from __future__ import annotations

from collections.abc import Callable

from shared.metrics import CollectorStatus


class FakeProgress:
    """Keeps the phases and the last status. `on_advance` is called whenever the process reports that it moves."""

    def __init__(self) -> None:
        self.on_advance: Callable[[], None] = lambda: None
        self.phases: list[str] = []
        self.last_status: CollectorStatus | None = None

    def advance(self) -> None:
        self.on_advance()

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def status(self, numbers: CollectorStatus) -> None:
        self.last_status = numbers
