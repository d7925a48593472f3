"""Start commands that see fake GPUs, for the tests in this folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fake_gpu.build import BuildError, build
from tests.fake_gpu.environment import check_switches, fake_gpu_environment

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 400.0  # far above what any command needs, because the machine may be busy


def need_cuda_build() -> None:
    """Skip the module's tests if torch is not the CUDA build that the fake libraries stand in for."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch is no CUDA build", allow_module_level=True)
    try:
        build()
    except BuildError as error:
        pytest.skip(str(error), allow_module_level=True)


def environment(switches: Mapping[str, str], *, operators: bool = True, root: Path = ROOT) -> dict[str, str]:
    """Return the environment of a command. switches: FAKE_GPU_* variables, see README.md."""
    check_switches(switches)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FAKE_GPU", "CUDA_"))}
    added = fake_gpu_environment(operators=operators, root=root)
    return own | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | added | dict(switches)


def run(*arguments: str, switches: Mapping[str, str], operators: bool = True, root: Path = ROOT) -> tuple[int, str]:
    """Run Python with these arguments on fake GPUs; return the exit code and everything that it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment(switches, operators=operators, root=root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stdout
