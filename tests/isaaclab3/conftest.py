"""Set-up of the tests with the real Isaac Lab 3: its installation, its robot assets, and one simulator per process."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from collector_proc.simulators.isaaclab.checks import is_isaac_lab_3
from tests.fakes.isaac_tiers import REPO, run_driver
from tests.isaaclab3.assets import make_assets

HOW_TO_INSTALL = (
    "Isaac Lab 3 is not installed; expected isaaclab 3.0.0 on PYTHONPATH; install it with: pip install --no-deps "
    "--ignore-requires-python --target FOLDER -r tests/requirements-isaaclab3.txt, and set PYTHONPATH=FOLDER"
)
Run = Callable[..., dict[str, Any]]


def pytest_report_header() -> str:
    """Return what these tests run on, and what they do not."""
    try:
        versions = f"Isaac Lab {version('isaaclab')} with Newton {version('newton')}"
    except PackageNotFoundError:
        return HOW_TO_INSTALL
    is_pinned = sys.version_info >= (3, 12) and version("torch").startswith("2.11.")
    label = "versions that it pins" if is_pinned else "off-label versions"
    return f"real {versions} physics on the CPU, on Python {platform.python_version()}, {label}"


@pytest.fixture(scope="session")
def isaac_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment variables of a process that runs Isaac Lab 3. Fails if it is not installed."""
    if not is_isaac_lab_3():
        pytest.fail(HOW_TO_INSTALL)
    assets = tmp_path_factory.mktemp("assets")
    make_assets(assets)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPO)]))
    added = {"PYTHONPATH": path, "ISAACSIM_ASSET_ROOT": str(assets), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def run_isaac(isaac_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs one task in a process of its own and returns what it recorded.

    The process starts in an empty folder, `cwd`, which the result names.
    """

    def run(
        task: str,
        *overrides: str,
        config: str = "isaaclab_cartpole",
        num_envs: int = 16,
        ticks: int = 100,
        nan: tuple[int, int] | None = None,
        native_from: int | None = None,
    ) -> dict[str, Any]:
        folder: Path = tmp_path_factory.mktemp("task")
        (folder / "cwd").mkdir()
        given = [f"env.name={task}", f"env.num_envs={num_envs}", "collector.eval_envs=2", *overrides]
        job = {"config": config, "overrides": given, "ticks": ticks, "nan": nan, "native_from": native_from}
        job["close_s"] = 60.0
        return run_driver(folder, job, isaac_env, cwd=folder / "cwd") | {"folder": folder}

    return run
