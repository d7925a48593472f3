"""Warnings about a run: each is a line in the log and in a file that launch reads for its display and its summary."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shared.files import LineFile

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

REPEAT_S = 600.0  # least time between two warnings of one cause


class WarningLines:
    """Gives warnings: most causes once in the life of this process, some again, but seldom."""

    def __init__(self, path: Path, log: FilteringBoundLogger) -> None:
        """path: `RunFolder.warnings` of this process. Its lines are JSON objects with the keys time, cause and text."""
        self._path, self._log = path, log
        self._given_at: dict[str, float] = {}  # time.monotonic() of the last warning of each cause

    def once(self, cause: str, text: str) -> None:
        """Warn, unless this cause was given before."""
        if cause not in self._given_at:
            self._give(cause, text)

    def is_due(self, cause: str) -> bool:
        """Return whether a cause that may be given again was not given in the last REPEAT_S seconds."""
        return time.monotonic() - self._given_at.get(cause, -REPEAT_S) >= REPEAT_S

    def again(self, cause: str, text: str) -> None:
        """Warn, unless this cause was given less than REPEAT_S seconds ago."""
        if self.is_due(cause):
            self._give(cause, text)

    def _give(self, cause: str, text: str) -> None:
        self._given_at[cause] = time.monotonic()
        self._log.warning(text, cause=cause)
        with suppress(OSError):  # on a full disk, the warning is lost: training must go on without it
            file = LineFile(self._path)
            file.append(json.dumps({"time": time.time(), "cause": cause, "text": text}))
            file.close()
