"""Every event is one JSON line in the log, and only warnings and errors reach the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from shared.logs import configure


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_json_lines_and_only_warnings_and_errors_reach_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    log = configure(tmp_path, "learner")
    log.info("replay allocated", num_bytes=4096, folder=tmp_path)
    structlog.get_logger().warning("chunk dropped", row=7)
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        log.exception("failed")
    info, warning, failed = _lines(tmp_path / "logs" / "learner.jsonl")
    assert (info["event"], info["num_bytes"], info["process"], info["level"]) == (
        "replay allocated",
        4096,
        "learner",
        "info",
    )
    assert info["folder"] == repr(tmp_path)
    assert (warning["row"], warning["level"]) == (7, "warning")
    assert "ValueError: bad\nvalue" in failed["exception"]
    shown = capsys.readouterr().err
    assert shown.startswith("learner warning: chunk dropped row=7\nlearner error: failed\nTraceback")
    assert "replay allocated" not in shown


def test_a_log_that_cannot_be_written_raises_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launch.jsonl").symlink_to("/dev/full")
    log = configure(tmp_path, "launch")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        log.warning("the disk is full")
        log.exception("it still is")
    monkeypatch.setattr("sys.stderr", None)
    log.error("closed")
