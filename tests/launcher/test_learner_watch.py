"""A learner that dies or hangs is replaced from the newest checkpoint. A failure that repeats itself ends the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
from tests.processes import DEADLINE_S, is_alive, wait_for_file

FAKES = Path(__file__).resolve().parents[1] / "fakes"
REPO = FAKES.parents[1]
QUICK = [
    "--config",
    "quickstart",
    "logger.backend=none",
    "optimization.total_optim_steps=40",
    "supervision.backoff_s=0",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def run_with(run: Path, learner: str, *settings: str, collector: str = "serve") -> tuple[int, dict]:
    """Run launch with fake children. Return its exit code and summary.json."""
    child = str(FAKES / "child.py")
    commands = {"learner": (sys.executable, child, learner), "collector": (sys.executable, child, collector)}
    code = launch.main([*QUICK, "--run-dir", str(run), *settings], commands=commands)
    assert not list(run.parent.glob("tandem-*")), "the folder of the sockets is removed"
    assert not any(map(is_alive, (event["pid"] for event in started(run))))
    return code, json.loads((run / "summary.json").read_text())


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "launch.jsonl").read_text().splitlines()]


def started(run: Path) -> list[dict]:
    return [event for event in events(run) if event["event"] == "started"]


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("progress", "exit code 1: last output of learner 0"),
        ("hang", "hung in phase training: no progress for"),
        ("stopped", "it ended by itself after 10 of 40 gradient steps, probably because of a signal"),
    ],
)
def test_a_learner_that_made_progress_is_replaced_from_its_checkpoint_together_with_the_collector(
    tmp_path: Path, how: str, cause: str
) -> None:
    run = tmp_path / "run"
    code, summary = run_with(run, f"lives:{how},2", "deadlines.step_s=2")
    assert (code, summary["exit_reason"]) == (0, "finished")
    assert (summary["learner_restarts"], summary["collector_restarts"]) == (2, 2)
    causes = summary["learner_restart_causes"]
    assert sum(causes.values()) == 2 and any(each.startswith(cause) for each in causes)
    assert [event["role"] for event in started(run)] == ["learner", "collector"] * 3
    learners = [event["command"] for event in started(run) if event["role"] == "learner"]
    assert ["--resume" in command for command in learners] == [False, True, True]


def test_the_same_death_without_progress_ends_the_run_and_names_the_cause(tmp_path: Path) -> None:
    code, summary = run_with(tmp_path / "run", "lives:same,9")
    assert (code, summary["learner_restarts"]) == (1, 1)
    for part in ("learner died (exit code 1: last output of learner 1) twice", "after step 10", "logs/learner.out"):
        assert part in summary["exit_reason"]


def test_a_death_before_the_first_checkpoint_begins_the_run_again_once(tmp_path: Path) -> None:
    code, summary = run_with(tmp_path / "once", "lives:unsaved,1")
    assert (code, summary["learner_restarts"]) == (0, 1)
    assert "--resume" not in started(tmp_path / "once")[2]["command"]
    code, summary = run_with(tmp_path / "twice", "lives:unsaved,2")
    assert code == 1 and "there is no checkpoint; expected one to continue from" in summary["exit_reason"]


def test_deaths_beyond_the_budget_end_the_run_although_each_learner_made_progress(tmp_path: Path) -> None:
    code, summary = run_with(tmp_path / "run", "lives:progress,9", "supervision.max_learner_restarts=2")
    assert (code, summary["learner_restarts"]) == (1, 2)
    assert "the last of 3 deaths within an hour" in summary["exit_reason"]
    assert "supervision.max_learner_restarts=2" in summary["exit_reason"]


def test_a_learner_that_ends_with_exit_code_0_before_it_trained_has_not_finished_the_run(tmp_path: Path) -> None:
    code, summary = run_with(tmp_path / "run", "die:0")
    assert code == 1 and "it ended by itself after 0 of 40 gradient steps" in summary["exit_reason"]


def test_collectors_that_fail_in_the_same_way_without_a_chunk_between_end_the_run(tmp_path: Path) -> None:
    code, summary = run_with(tmp_path / "run", "save", collector="repeat:joint limits violated")
    assert (code, summary["collector_restarts"]) == (1, 1)
    assert "two collectors died in the same way (exit code 1, after the output: joint limits" in summary["exit_reason"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "00000060", "the learner has saved"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets; that of `tmp_path` may not be."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_learner_that_is_killed_by_any_signal_is_replaced_and_a_deleted_socket_folder_is_made_again(
    tmp_path: Path, short_folder: Path
) -> None:
    run, folder = tmp_path / "run", short_folder
    command = [sys.executable, str(FAKES / "launch_with.py"), "save", "serve", *QUICK, "--run-dir", str(run)]
    command.append("optimization.total_optim_steps=100000")
    env = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(folder)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for number, signum in enumerate((signal.SIGKILL, signal.SIGTERM)):
            wait_for_file(run / "learner-serves")
            wait_for_file(run / "collector-serves")
            (run / "learner-serves").unlink()
            (run / "collector-serves").unlink()
            learner = [event for event in started(run) if event["role"] == "learner"][number]
            shutil.rmtree(next(folder.glob("tandem-*")))
            os.kill(learner["pid"], signum)
        wait_for_file(run / "learner-serves")
        assert [made.is_dir() for made in folder.glob("tandem-*")] == [True]
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 143
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["learner_restarts"] == 2
    assert list(summary["learner_restart_causes"]) == [
        "SIGKILL",
        "it ended by itself after 60 of 100000 gradient steps, probably because of a signal",
    ]
