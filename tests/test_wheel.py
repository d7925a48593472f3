"""The built wheel is complete: installed alone, its command `tandem` trains from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "launch.py", "configs"]
PACKAGES = ["shared", "launcher", "collector_proc", "learner_proc"]
TINY = [
    "networks.state_dim=4",
    "networks.rssm_hidden_dim=16",
    "networks.hidden_dim=16",
    "replay_buffer.batch_size=64",
    "replay_buffer.batch_length=8",
    "optimization.log_every=5",
]


def _run(*command: str | Path, cwd: Path, timeout_s: float = 300.0) -> str:
    """Run a command without the checkout on its path; return its output, and fail with it on a non-zero exit code."""
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MUJOCO_GL")}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, without a network, from a copy: a build in the checkout would leave files there."""
    source = tmp_path_factory.mktemp("source")
    for name in [*SOURCES, *PACKAGES]:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, source / name)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def tandem(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a fresh environment, which borrows the dependencies of this one; return the command."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    # A .pth line adds a folder but does not run the .pth files in it, so an editable install of the project stays out.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return folder / "bin" / "tandem"


def test_the_wheel_holds_every_package_and_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for name in [*PACKAGES, "configs"] for path in (REPO / name).rglob("*")]
    expected = {str(path.relative_to(REPO)) for path in sources if path.suffix in (".py", ".yaml")} | {"launch.py"}
    assert len(expected) > 60
    assert not expected - names, "files of the tree that the wheel lacks"
    installed = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert installed == {*PACKAGES, "configs", "launch.py"}


def test_the_installed_command_reports_the_version(tandem: Path, tmp_path: Path) -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert version in _run(tandem, "--version", cwd=tmp_path)


def test_the_installed_command_trains_from_an_empty_folder(tandem: Path, tmp_path: Path) -> None:
    output = _run(tandem, "--config", "quickstart", *TINY, "optimization.total_optim_steps=20", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], output
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "summary.json").read_text())
    assert result["exit_reason"] == "finished" and result["gradient_steps"] == 20


def test_the_installed_command_returns_launch_exit_codes(tandem: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [tandem, "--config", "no_such_config"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2 and "no_such_config" in result.stderr
    assert not list(tmp_path.iterdir())
