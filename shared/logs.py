"""The log of a process: `logs/<process>.jsonl`, one JSON line per event. Warnings and errors also go to stderr."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from shared.files import LineFile
from shared.output import write_error

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
    return f"{event.get('process', '?')} {event['level']}: {event['event']}{details}{trace}"
