"""Logs: one JSON line per event in `logs/<process>.jsonl`; warnings and errors also as a human line on stderr."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

_LOUD = ("warning", "error", "critical")


def configure(run_dir: Path, process: str) -> structlog.typing.FilteringBoundLogger:
    """The process's logger; afterwards `structlog.get_logger()` anywhere in this process writes to the same file."""
    file = (run_dir / "logs" / f"{process}.jsonl").open("a", buffering=1)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _say_loud,
            structlog.processors.JSONRenderer(default=repr),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=file),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(process=process)
    return structlog.get_logger()


def _say_loud(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if event["level"] in _LOUD:
        sys.stderr.write(human_line(event) + "\n")
        sys.stderr.flush()
    return event


def human_line(event: MutableMapping[str, Any]) -> str:
    """`learner warning: message key=value ...`, with an exception's traceback on lines of its own."""
    quiet = ("event", "level", "timestamp", "process", "exception")
    details = "".join(f" {key}={value}" for key, value in event.items() if key not in quiet)
    trace = f"\n{event['exception']}" if "exception" in event else ""
    return f"{event.get('process', '?')} {event['level']}: {event['event']}{details}{trace}"
