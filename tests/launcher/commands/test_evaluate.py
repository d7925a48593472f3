"""The command `evaluate`: its numbers, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import launch


def _evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert launch.main(["evaluate", "runs/NAME", "--json", *arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_each_checkpoint_gets_its_statistics_and_all_returns(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_dir.parent / "all.json"
    found = _evaluate(capsys, "--checkpoint", "all", "--episodes", "5", "--out", str(out))
    assert json.loads(out.read_text()) == found
    assert [result["gradient_steps"] for result in found["checkpoints"]] == [10, 20]
    for result in found["checkpoints"]:
        assert len(result["returns"]) == 5 and result["lengths"] == [20] * 5
        assert result["mean"]["value"] == pytest.approx(sum(result["returns"]) / 5, rel=1e-9)
        assert result["mean"]["low"] <= result["iqm"]["value"] <= result["mean"]["high"]
    assert found["seed"] == 500_000


def test_the_same_seed_gives_the_same_returns_and_another_seed_gives_others(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, other = (
        _evaluate(capsys, "--episodes", "3", "--seed", seed)["checkpoints"][0]["returns"] for seed in ("1", "1", "2")
    )
    assert first == again and first != other


def test_settings_of_the_environment_change_it(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _evaluate(capsys, "--episodes", "2", "env.horizon=7", "env.frame_skip=1", "env.num_envs=1")
    assert found["checkpoints"][0]["lengths"] == [7, 7]
    assert found["environment"]["num_envs"] == 1 and found["overrides"][0] == "env.horizon=7"


def test_the_table_has_a_line_for_each_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["evaluate", "runs/NAME", "--checkpoint", "all", "--episodes", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["step", "episodes", "mean", "median", "IQM"]
    assert [line.split()[:2] for line in lines] == [["10", "2"], ["20", "2"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/NAME", "--episodes", "0"], "--episodes 0 plays nothing"),
        (["runs/OTHER"], "runs/OTHER is not the folder of a run: it has no config.yaml"),
        (["runs/NAME", "--checkpoint", "11"], "expected best, latest, all or one of the steps 10, 20"),
        (["runs/NAME", "networks.hidden_dim=8"], "networks.hidden_dim=8 cannot change a trained policy"),
        (["runs/NAME", "env.task=swngup"], "env.task=swingup"),
        (["runs/NAME", "--device", "cuda:3"], "--device cuda:3 is not a device of this machine; expected one of cpu"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
