"""Which checkpoints of a run the commands read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint_choice import choose_checkpoints
from shared.checkpoints import whole_checkpoints, write_manifest
from shared.errors import SettingError
from shared.run_folder import RunFolder


def _steps(run: Path, choice: str) -> list[int]:
    return [int(folder.name) for folder in choose_checkpoints(RunFolder(run), choice)]


@pytest.mark.parametrize(("choice", "steps"), [("latest", [20]), ("all", [10, 20]), ("10", [10]), ("best", [10])])
def test_a_checkpoint_is_chosen_by_step_age_or_the_runs_own_evaluation(
    choice: str, steps: list[int], run_dir: Path
) -> None:
    assert _steps(run_dir, choice) == steps


@pytest.mark.parametrize("choice", ["15", "newest", ""])
def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(choice: str, run_dir: Path) -> None:
    with pytest.raises(SettingError, match=f"--checkpoint {choice} is not a checkpoint of .*steps 10, 20; choose one"):
        _steps(run_dir, choice)


def test_the_best_checkpoint_needs_an_evaluation(run_dir: Path) -> None:
    for checkpoint in whole_checkpoints(run_dir / "checkpoints"):
        write_manifest(checkpoint.folder, replace(checkpoint.manifest, eval_return_mean=None))
    with pytest.raises(SettingError, match=r"--checkpoint best compares evaluation returns.*; use --checkpoint latest"):
        _steps(run_dir, "best")


def test_the_newest_of_equally_good_checkpoints_is_the_best(run_dir: Path) -> None:
    for checkpoint in whole_checkpoints(run_dir / "checkpoints"):
        write_manifest(checkpoint.folder, replace(checkpoint.manifest, eval_return_mean=-5.0))
    assert _steps(run_dir, "best") == [20]


def test_a_checkpoint_that_is_not_whole_is_not_chosen(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "00000020" / "state.pt").write_bytes(b"cut")
    assert _steps(run_dir, "latest") == [10]
    (run_dir / "checkpoints" / "00000010" / "manifest.json").unlink()
    with pytest.raises(SettingError, match=r"no whole checkpoint in .*; expected the folder of a run that has saved"):
        _steps(run_dir, "latest")
