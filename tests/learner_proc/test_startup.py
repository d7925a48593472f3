"""A learner that cannot get its memory refuses to start, and names the settings that need it."""

from __future__ import annotations

import pytest
import torch

from learner_proc.__main__ import train
from learner_proc.startup import allocate_replay
from shared.errors import SettingError
from shared.geometry import Geometry
from shared.lifetime import ExitCode
from shared.memory import total_bytes
from shared.progress import read
from tests.fakes.scripted_collector import SPEC


def test_a_replay_larger_than_the_memory_of_the_machine_is_refused(process):
    settings = process.settings
    settings.replay_buffer.buffer_size = total_bytes()  # of rows, and each row takes more than one byte
    geometry = Geometry.of(settings)
    with pytest.raises(SettingError, match=r"buffer_size=\d+ takes .* GB of host memory.*; set replay_buffer\.b"):
        allocate_replay(SPEC, settings, geometry, device=torch.device("cpu"))


@pytest.mark.parametrize("large", ["buffer_size", "hidden_dim"])
def test_a_learner_without_enough_memory_refuses_to_start(process, monkeypatch, large):
    def start(*arguments, **options):
        if large == "hidden_dim":
            torch.empty(1 << 60)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("learner_proc.waiting.WaitingLearner", start)
    assert train(process, "cpu", resume=False) == ExitCode.REFUSED
    refusal = read(process.run_dir / "learner.progress").refusal
    assert "too little memory" in refusal and f".{large}" in refusal


def test_another_error_at_the_start_is_not_taken_for_missing_memory(process, monkeypatch):
    def start(*arguments, **options):
        raise RuntimeError("a defect")

    monkeypatch.setattr("learner_proc.waiting.WaitingLearner", start)
    with pytest.raises(RuntimeError, match="a defect"):
        train(process, "cpu", resume=False)
