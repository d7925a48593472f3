"""The probe: which options it accepts, and what it counts in the arrivals of a simulator."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from collector_proc.simulators.base import Arrival
from launcher import devices, probe
from launcher.devices import Gpu
from launcher.probe import StreamCheck
from shared.stream import ObsSpec, StreamSpec

SPEC = StreamSpec(2, {"policy": ObsSpec((1,), "float32")}, 1)


@pytest.mark.parametrize(
    ("options", "num_gpus", "message"),
    [
        (["--ticks", "0"], 0, r"--ticks 0 takes no step; expected at least 1; leave it out"),
        (["--ticks=-5"], 0, r"--ticks -5 takes no step; expected at least 1; leave it out"),
        (["--device", "foo"], 0, r"--device foo is not a device .*; expected one of cpu; leave it out to use cpu"),
        (["--device", "cuda:7"], 2, r"--device cuda:7 is not .*; expected one of cuda:0, cuda:1, cpu; leave .* cuda:0"),
    ],
)
def test_an_option_that_cannot_work_ends_the_probe_with_2_before_the_simulator_starts(
    options: list[str],
    num_gpus: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus = [Gpu(index, f"GPU-{index}", "H100") for index in range(num_gpus)]
    monkeypatch.setattr(devices, "list_gpus", lambda: (gpus, ()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "argv", ["probe", "--config", "quickstart", *options])
    with pytest.raises(SystemExit) as ended:
        probe.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def flags(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


def test_last_observations_that_equal_the_row_before_are_counted() -> None:
    obs = [{"policy": torch.tensor([[value], [10.0 + value]])} for value in (0.0, 1.0)]
    obs[1]["policy"][1] = 10.0  # the last observation of environment 1 equals the one before
    both, none = flags(True, True), flags(False, False)
    seen = StreamCheck(Arrival(obs[0], torch.zeros(2), both, none, none, acting_obs=obs[0]), SPEC)
    fresh = {"policy": torch.full((2, 1), 7.0)}
    seen.add(Arrival(obs[1], torch.ones(2), none, both, none, acting_obs=fresh))
    assert (seen.num_ends, seen.num_stale, seen.num_same) == (2, 1, 0)


def test_a_row_that_diverged_is_no_end_of_an_episode() -> None:
    obs = [{"policy": torch.full((2, 1), value)} for value in (0.0, 1.0)]
    both, none, second = flags(True, True), flags(False, False), flags(False, True)
    seen = StreamCheck(Arrival(obs[0], torch.zeros(2), both, none, none, acting_obs=obs[0]), SPEC)
    seen.add(Arrival(obs[1], torch.ones(2), second, both, none, acting_obs=obs[1], diverged=second))
    assert seen.num_ends == 1 and seen.flags_agree
