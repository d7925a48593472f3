"""Periodic checkpoints never end the training, and loading a checkpoint has the deadline for checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

from learner_proc.checkpoint import CheckpointError
from learner_proc.learn import Learner
from learner_proc.waiting import WaitingLearner
from shared.errors import TransportError
from shared.handover import connect


def built(waiting: WaitingLearner, join) -> Learner:
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
    waiting.serve()
    assert waiting.link.streaming is not None
    return waiting.build(waiting.link.streaming.shared)


def full(*arguments, **options) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file")


def test_a_periodic_checkpoint_that_fails_is_reported_and_tried_again(process, waiting, join, monkeypatch):
    learner = built(waiting, join)
    process.settings.checkpoint.every_s = 0.0
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        learner.train()
    assert list((process.run_dir / "checkpoints").iterdir()) == []
    events = [json.loads(line) for line in (process.run_dir / "logs" / "learner.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["level"] == "warning"]
    assert "step 1 could not be saved, there is no earlier one: Pytorch" in warning["reason"]
    learner.train()
    assert (process.run_dir / "checkpoints" / "latest").read_text() == "00000002"


def test_a_last_checkpoint_that_fails_is_an_error_after_everything_is_closed(
    process, waiting, join, monkeypatch, tmp_path
):
    learner = built(waiting, join)
    process.settings.optimization.total_optim_steps = 1
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        learner.run()
    with pytest.raises(TransportError):
        connect(tmp_path, deadline_s=0.1, alive=lambda: None)


def test_a_checkpoint_is_loaded_in_the_phase_whose_deadline_is_that_of_checkpoints(
    process, waiting, join, monkeypatch, tmp_path
):
    learner = built(waiting, join)
    process.settings.optimization.total_optim_steps = 1
    learner.run()
    (tmp_path / "replay.sock").unlink()
    phases, advances = [], []
    monkeypatch.setattr(process.progress, "phase", phases.append)
    monkeypatch.setattr(process.progress, "advance", lambda: advances.append(len(phases)))
    resumed = WaitingLearner(process, device=torch.device("cpu"), resume=True)
    assert phases == ["resuming"] and resumed.counters.gradient_steps == 1
    join(resumed.serve)
    assert phases == ["resuming", "resuming", "hello"] and 2 in advances, "each block of the replay counts as progress"
    resumed.link.close()


def test_a_run_that_was_stopped_in_its_prefill_resumes_with_the_rest_of_the_random_actions(
    process, waiting, join, tmp_path
):
    """The rows are restored before the welcome is sent, so the welcome already counts them."""
    collector = join(waiting.serve)
    collector.commit_next()
    waiting.serve()
    assert waiting.link.streaming is not None
    learner = waiting.build(waiting.link.streaming.shared)
    process.stop.requested = True
    learner.run()
    assert learner.counters.gradient_steps == 0
    (tmp_path / "replay.sock").unlink()
    resumed = WaitingLearner(process, device=torch.device("cpu"), resume=True)
    welcome = join(resumed.serve).welcome
    assert (welcome.random_frames, welcome.agent_steps) == (16, 16)
    resumed.link.close()
