"""Periodic checkpoints never end the training, and loading a checkpoint has the deadline for checkpoints."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest
import torch

from learner_proc.finishing import Finisher
from learner_proc.learn import Learner
from learner_proc.numbers import Numbers
from learner_proc.saver import BadStateError
from learner_proc.waiting import WaitingLearner
from shared import metrics
from shared.checkpoints import CheckpointError, newest_checkpoint
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
    process.settings.checkpoint.every_s = 0.0
    learner.train()
    learner._saver.wait()
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


def warnings(process) -> list[str]:
    lines = (process.run_dir / "logs" / "learner.jsonl").read_text().splitlines()
    return [event["reason"] for event in map(json.loads, lines) if event["level"] == "warning"]


def numbers(*, skipped: float) -> Numbers:
    return Numbers((metrics.SKIPPED,), torch.tensor([skipped]))


@pytest.mark.parametrize("group", ["normaliser", "actor", "adam_model"])
def test_a_state_that_is_not_finite_is_not_saved_and_tried_again_soon(process, waiting, join, monkeypatch, group):
    learner, saves = built(waiting, join), process.run_dir / "checkpoints"
    learner.train()
    process.settings.checkpoint.every_s = 100.0
    saver = learner._saver
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    now += 101
    saver.save_if_due()
    saver.wait()
    assert newest_checkpoint(saves) is not None
    tensor = next(iter(t for t in learner._step.tensors()[group].values() if t.is_floating_point() and t.numel() > 1))
    before = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    now += 101
    saver.save_if_due()
    assert [path.name for path in saves.glob("0*")] == ["00000001"]
    (reason,) = warnings(process)
    assert re.search(rf"step 1 was not saved: {group}/.* not finite; expected finite", reason)
    tensor.copy_(before)
    now += 30
    saver.save_if_due()
    assert len(list(saves.glob("0*"))) == 1, "one minute has not passed"
    now += 31
    saver.save_if_due()
    saver.wait()
    assert len(list(saves.glob("0*"))) == 2


def test_nothing_is_saved_while_steps_are_skipped(process, waiting, join):
    learner, saves = built(waiting, join), process.run_dir / "checkpoints"
    process.settings.checkpoint.every_s = 0.0
    learner._writer.add_step(numbers(skipped=1.0))
    learner._saver.save_if_due()
    assert not list(saves.glob("0*")) and "step was skipped, 1 in a row" in warnings(process)[0]
    learner._saver.save()
    assert len(list(saves.glob("0*"))) == 1, "one skipped step is no reason to end without the last checkpoint"
    for _ in range(49):
        learner._writer.add_step(numbers(skipped=1.0))
    with pytest.raises(BadStateError, match="50 in a row"):
        learner._saver.save()
    learner._writer.add_step(numbers(skipped=0.0))
    learner._saver.save_if_due()
    learner._saver.wait()
    assert len(list(saves.glob("0*"))) == 2


def test_training_goes_on_while_a_checkpoint_is_finished_and_no_second_one_begins(process, waiting, join, monkeypatch):
    learner, saves = built(waiting, join), process.run_dir / "checkpoints"
    process.settings.checkpoint.every_s = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(Finisher, "poll", lambda self: None)
        for _ in range(3):
            learner.train()
        assert [path.name for path in saves.glob(".partial-*")] == [".partial-00000001"]
    assert learner.counters.gradient_steps == 3
    learner._saver.wait()
    assert [path.name for path in saves.glob("0*")] == ["00000001"]
    learner._saver.save()
    assert sorted(path.name for path in saves.glob("0*")) == ["00000001", "00000003"]


def test_a_checkpoint_that_cannot_be_finished_is_reported_and_the_next_one_is_whole(
    process, waiting, join, monkeypatch
):
    learner, saves = built(waiting, join), process.run_dir / "checkpoints"
    learner.train()
    process.settings.checkpoint.every_s = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        learner._saver.save_if_due()
        learner._saver.wait()
    assert "step 1 could not be saved" in warnings(process)[0]
    learner._saver.save()
    assert newest_checkpoint(saves) is not None
