"""A run with two checkpoints of small networks, which the tests of the commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import launch
from launcher.trained.exporting import PACKAGES
from shared.compose import compose
from shared.run_folder import RunFolder
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.saved_run import SMALL, save_run


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the pendulum with checkpoints of steps 10 and 20, of which the first evaluated better."""
    folder = RunFolder(tmp_path_factory.mktemp("saved") / "runs" / "NAME")
    save_run(
        folder,
        compose("quickstart", [*SMALL, "env.horizon=20"]),
        StreamSpec(8, {"policy": ObsSpec((3,), "float32")}, 1),
    )
    return folder.path


@pytest.fixture(scope="session")
def export_packages() -> None:
    """Skip a test where the extra `export` is not installed, as beside Isaac Sim."""
    for name in PACKAGES:
        pytest.importorskip(name)


@pytest.fixture(scope="session")
def exported_run(saved_run: Path, export_packages: None) -> Path:
    """The folder into which the command `export` wrote the best checkpoint of the run."""
    out = saved_run.parent.parent / "exported"
    assert launch.main(["export", str(saved_run), "--checkpoint", "best", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run_dir(saved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run as runs/NAME of the current folder; no GPU of this machine is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Path(shutil.copytree(saved_run, tmp_path / "runs" / "NAME"))
