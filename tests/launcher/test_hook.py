"""The hook gets each event without making the run wait, and neither hangs nor fails it."""

from __future__ import annotations

import json
from pathlib import Path

import structlog

from launcher.events import Events
from launcher.hook import MAX_RUNNING, Hook
from tests.processes import is_alive, wait_for_file


def make(folder: Path, command: str | None, deadline_s: float = 60.0) -> Hook:
    return Hook(command, deadline_s=deadline_s, output=folder / "out", log=structlog.get_logger())


def test_a_command_gets_each_event_as_json_on_stdin(tmp_path: Path) -> None:
    hook = make(tmp_path, f"cat >> {tmp_path}/events; echo called")
    events = Events(hook.call)
    events.restart("learner", "SIGKILL", step=7)
    hook.close()
    events.warning("the disk is full")
    hook.close()
    first, second = (json.loads(line) for line in (tmp_path / "events").read_text().splitlines())
    assert {key: first[key] for key in ("event", "role", "cause", "planned", "step")} == {
        "event": "restart", "role": "learner", "cause": "SIGKILL", "planned": False, "step": 7,
    }  # fmt: skip
    assert (second["event"], second["text"]) == ("warning", "the disk is full")
    assert (tmp_path / "out").read_text() == "called\ncalled\n"


def test_a_command_that_hangs_is_killed_with_its_children_and_later_events_do_not_wait(tmp_path: Path) -> None:
    hook = make(tmp_path, f"sleep 600 & echo $! > {tmp_path}/$$; mv {tmp_path}/$$ {tmp_path}/pid; wait", 600.0)
    for number in range(MAX_RUNNING + 3):
        hook.call({"text": str(number)})
    wait_for_file(tmp_path / "pid")
    hook.close(give_up=lambda: True)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    late = make(tmp_path, "sleep 600", deadline_s=0.1)
    late.call({"text": "x"})
    late.close()


def test_a_command_that_fails_or_reads_nothing_does_no_harm(tmp_path: Path) -> None:
    for command in ("exit 3", "exec <&-; true", "no_such_program"):
        hook = make(tmp_path, command)
        hook.call({"text": "x" * 100_000})
        hook.close()
    without = make(tmp_path, None)
    without.call({"text": "x"})
    without.close()
