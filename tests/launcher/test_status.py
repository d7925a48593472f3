"""`launch.py status` works while a run is active, after its end, and after launch was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.commands.status import main, read_status_file
from shared.errors import SettingError
from tests.fakes.child import save_checkpoint
from tests.processes import DEADLINE_S, wait_for_file

FAKES = Path(__file__).resolve().parents[1] / "fakes"
REPO = FAKES.parents[1]


def show(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main([str(run), *options]) == 0
    return capsys.readouterr().out


def test_a_run_can_be_looked_at_from_its_start_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, heard = tmp_path / "run", tmp_path / "heard"
    command = [sys.executable, str(FAKES / "launch_with.py"), "lives:progress,1", "serve", "--config", "quickstart"]
    command += ["--run-dir", str(run), "logger.backend=none", "optimization.total_optim_steps=40"]
    command += [f"supervision.on_event='cat >> {heard}'"]
    env = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    text = show(run, capsys)
    for part in (
        f"run        {run}\n",
        "with exit code 0: finished\n",
        "restarts   learner: 1: exit code 1: last output of learner 0 (1)\n",
        "checkpoint step 10, ",
        "GB of disk",
        "GB of memory",
        "learner: exit code 1: last output of learner 0\n",
    ):
        assert part in text, text
    status = json.loads(show(run, capsys, "--json"))
    assert (status["state"], status["exit_code"], status["restarts"]) == ("ended", 0, {"learner": 1, "collector": 1})
    events = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [event["event"] for event in events] == ["restart", "end"]
    assert all(event["run"] == str(run) for event in events)
    assert (events[1]["text"], events[1]["exit_code"]) == ("finished", 0)


def test_a_launch_that_was_killed_is_silent_after_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = [sys.executable, str(FAKES / "launch_with.py"), "serve", "serve", "--config", "quickstart"]
    env = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--run-dir", str(run), "logger.backend=none"], env=env, stdout=-3, stderr=-3)
    try:
        wait_for_file(run / "status.json")
        assert "running since" in show(run, capsys)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    written_at = json.loads((run / "status.json").read_text())["updated"]
    assert read_status_file(run, now=written_at + 30)["state"] == "running"
    assert read_status_file(run, now=written_at + 61)["state"] == "silent"


def test_a_damaged_checkpoint_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(
        json.dumps({
            "updated": 0.0, "started": 0.0, "state": "ended", "exit_code": 1, "reason": "x", "launch_pid": 1,
            "host": "h", "restart_causes": {}, "resources": {}, "last_problem": None, "events": [],
        })
    )  # fmt: skip
    (save_checkpoint(tmp_path, 30) / "state.pt").write_text("cut")
    assert "checkpoint none; 1 damaged\nproblem    none\n" in show(tmp_path, capsys)


@pytest.mark.parametrize("content", [None, "", "[]", '{"state": "running"}'])
def test_a_folder_without_a_status_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(SettingError, match=r"has no status that can be read: .*; expected the folder of a run"):
        main([str(tmp_path)])
