"""In lockstep, a run that is stopped, killed and resumed equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from learner_proc.checkpoint import load_newest
from learner_proc.startup import open_run
from tests.e2e.test_training import DMC, PENDULUM, TINY, finish, rows, start, wait_for_steps, without_times

LOCKSTEP = ["collector.mode=lockstep", "optimization.replay_ratio=2", "checkpoint.every_steps=20"]


def assert_equal(one: Any, other: Any, place: str = "") -> None:
    """Compare nested values; tensors must be equal in every bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, place
        assert one.numpy().tobytes() == other.numpy().tobytes(), place
    else:
        assert one == other, (place, one, other)


def assert_same_run(one: Path, other: Path) -> None:
    """Compare the metrics, evaluations, networks, optimisers, random states, counters and replays of two runs."""
    assert without_times(rows(one)) == without_times(rows(other))
    assert (one / "evaluations.jsonl").read_text() == (other / "evaluations.jsonl").read_text()
    states = [load_newest(folder / "checkpoints")[1] for folder in (one, other)]
    for state in states:
        del state["counters"]["wall_s"]
    assert_equal(states[0], states[1])
    replays = [open_run(folder)[2] for folder in (one, other)]
    assert replays[0].num_rows == replays[1].num_rows > 0
    for entry in replays[0].layout.fields:
        first, second = (replay.views.get(entry.key)[: replay.num_rows] for replay in replays)
        assert first.numpy().tobytes() == second.numpy().tobytes(), entry.name


def run(folder: Path, *arguments: str) -> Path:
    launch = start(folder, *arguments)
    output = finish(launch)
    assert launch.returncode == 0, output
    return folder


def test_a_run_that_was_stopped_and_killed_equals_one_that_was_not(tmp_path: Path) -> None:
    arguments = (*PENDULUM, *LOCKSTEP, "optimization.total_optim_steps=70")
    whole = run(tmp_path / "whole", *arguments)
    parts = tmp_path / "parts"
    launch = start(parts, *arguments)
    wait_for_steps(parts, 24, launch)
    launch.send_signal(signal.SIGTERM)
    output = finish(launch)
    assert launch.returncode == 143, output
    assert "--resume" in output and (parts / "checkpoints" / "latest").read_text() in ("00000020", "00000040")
    launch = start(parts, "--resume", str(parts))
    wait_for_steps(parts, 44, launch)
    launch.kill()
    finish(launch)
    run(parts, "--resume", str(parts))
    assert [row["gradient_steps"] for row in rows(whole)] == list(range(5, 71, 5))
    assert_same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pendulum", "dm_control"])
def test_a_finished_run_that_is_trained_further_equals_a_longer_one(tmp_path: Path, task: str) -> None:
    dmc = ("--config", "quickstart_dmc", "env.name=cartpole", "env.task=balance", "collector.eval_envs=1", *TINY, *DMC)
    # The ring is overwritten before the end.
    chosen = (*(PENDULUM if task == "pendulum" else dmc), *LOCKSTEP, "replay_buffer.buffer_size=2000")
    whole = run(tmp_path / "whole", *chosen, "optimization.total_optim_steps=100")
    parts = run(tmp_path / "parts", *chosen, "optimization.total_optim_steps=40")
    launch = start(parts, "--resume", str(parts), "optimization.total_optim_steps=100")
    wait_for_steps(parts, 63, launch)
    launch.send_signal(signal.SIGTERM)
    finish(launch)
    run(parts, "--resume", str(parts))
    assert_same_run(whole, parts)
    events = [json.loads(line) for line in (whole / "logs" / "collector.jsonl").read_text().splitlines()]
    assert [event["number"] for event in events if event["event"] == "another round begins"][:4] == [1, 2, 3, 4]
