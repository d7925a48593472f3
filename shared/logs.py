"""The log of a process: `logs/<process>.jsonl`, one JSON line per event. Warnings and errors also go to stderr."""

from __future__ import annotations

import re
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from shared.files import LineFile
from shared.output import write_error

EVERY_S = 10.0  # seconds between two lines of a `LimitedLog` about the same event
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHOWN_LEVELS = ("warning", "error", "critical")


def configure(run_dir: Path, process: str) -> structlog.typing.FilteringBoundLogger:
    """Return the logger of this process. From then on, `structlog.get_logger()` writes to the same file."""
    file = _LogFile(LineFile(run_dir / "logs" / f"{process}.jsonl"))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _show_on_stderr,
            structlog.processors.JSONRenderer(default=repr),
        ],
        logger_factory=lambda *_: file,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(process=process)
    return structlog.get_logger()


class _LogFile:
    """Appends the lines of a log to its file. A line is lost if the disk is full: training must go on without it."""

    def __init__(self, file: LineFile) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        """Append a line."""
        with suppress(OSError):
            self._file.append(line)

    # structlog calls the method that has the name of the level.
    debug = info = warning = error = critical = exception = msg


class LimitedLog:
    """Logs each event at once, and then at most once in EVERY_S seconds, with the number of times that it happened.

    For events that another process can cause as often as it likes.
    """

    def __init__(self, log: structlog.typing.FilteringBoundLogger | None = None) -> None:
        """log: by default, the logger of this process."""
        self._log = structlog.get_logger() if log is None else log
        self._logged_at: dict[str, float] = {}
        self._kept: dict[str, tuple[str, int, dict[str, Any]]] = {}  # event -> level, number and newest details

    def warning(self, event: str, *, number: int = 1, **details: Any) -> None:
        """Log a warning that happened `number` times."""
        self._note("warning", event, number, details)

    def error(self, event: str, *, number: int = 1, **details: Any) -> None:
        """Log an error that happened `number` times."""
        self._note("error", event, number, details)

    def flush(self, *, now: bool = False) -> None:
        """Log what was kept back and is due. `now`: log all of it."""
        for event in [event for event in self._kept if now or self._is_due(event)]:
            level, number, details = self._kept.pop(event)
            self._write(level, event, number, details)

    def _note(self, level: str, event: str, number: int, details: dict[str, Any]) -> None:
        if event in self._kept:
            number += self._kept[event][1]
        self._kept[event] = (level, number, details)
        self.flush()

    def _is_due(self, event: str) -> bool:
        return time.monotonic() - self._logged_at.get(event, -EVERY_S) >= EVERY_S

    def _write(self, level: str, event: str, number: int, details: dict[str, Any]) -> None:
        self._logged_at[event] = time.monotonic()
        times = {"number": number} if number > 1 else {}
        getattr(self._log, level)(event, **times, **details)


def _show_on_stderr(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Write warnings and errors to stderr, and pass every event on unchanged."""
    if event["level"] in _SHOWN_LEVELS:
        write_error(human_line(event) + "\n")
    return event


def human_line(event: MutableMapping[str, Any]) -> str:
    """Return an event as text, "learner warning: message key=value", followed by its traceback if it has one."""
    not_details = ("event", "level", "timestamp", "process", "exception")
    details = "".join(f" {key}={value}" for key, value in event.items() if key not in not_details)
    trace = f"\n{event['exception']}" if "exception" in event else ""
    line = f"{event.get('process', '?')} {event['level']}: {event['event']}{details}{trace}"
    return _CONTROL.sub("?", line)  # a text of another process could otherwise move the cursor of the terminal
