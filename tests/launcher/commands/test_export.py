"""The command `export`: where the files go, and the range of the actions in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch
from collector_proc.simulators.pendulum.simulator import PendulumSimulator
from launcher import trained_run
from shared.errors import SimulatorError


def test_every_file_is_written_and_actions_have_the_simulators_range(exported_run: Path) -> None:
    names = {"policy.onnx", "policy.pt2", "policy.safetensors", "policy.json", "run_policy.py"}
    assert {path.name for path in exported_run.iterdir()} == names
    facts = json.loads((exported_run / "policy.json").read_text())
    assert facts["gradient_steps"] == 10, "the best checkpoint"
    assert (facts["outputs"][0]["low"], facts["outputs"][0]["high"]) == ([-2.0], [2.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "all"], "--checkpoint all names several"),
        (["--checkpoint", "11"], "one of the steps 10, 20"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["export", "runs/NAME", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "export").exists()


def test_a_simulator_that_does_not_start_is_refused_with_the_option_that_does_without_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SimulatorError("no licence")

    monkeypatch.setattr(trained_run, "build_simulator", fail)
    assert launch.main(["export", "runs/NAME"]) == 2
    assert "no licence. Add --unit-actions to export without a simulator" in capsys.readouterr().err


def test_a_simulator_without_a_known_range_is_refused_with_the_same_option(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")  # looked for before the simulator starts
    monkeypatch.delattr(PendulumSimulator, "action_range")
    assert launch.main(["export", "runs/NAME"]) == 2
    assert "PendulumSimulator does not report the range of its actions" in capsys.readouterr().err
