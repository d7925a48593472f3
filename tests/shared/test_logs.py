"""Every event is one JSON line in the log, and only warnings and errors reach the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from shared.logs import LimitedLog, configure, human_line


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


def test_an_event_that_happens_often_is_logged_at_once_and_then_seldom_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = LimitedLog(configure(tmp_path, "learner"))
    for number in range(50):
        log.warning("message dropped", kind=number)
    log.error("collector refused")
    log.flush()
    now[0] += 11.0
    log.flush()
    lines = [(line["event"], line.get("kind"), line.get("number")) for line in _lines(tmp_path / "logs/learner.jsonl")]
    assert lines == [("message dropped", 0, None), ("collector refused", None, None), ("message dropped", 49, 49)]


def test_text_of_another_process_cannot_control_the_terminal() -> None:
    assert human_line({"process": "learner", "level": "warning", "event": "\x1b[2Ja\x9bb\nc", "x": "\x07"}) == (
        "learner warning: ?[2Ja?b\nc x=?"
    )
