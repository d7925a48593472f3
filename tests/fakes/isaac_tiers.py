"""Run the Isaac Lab backend without Isaac Sim, on one of two tiers.

Tier A is a fake `isaaclab` package. Tier B is Isaac Lab's own Python layer on a stub of Kit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

FAKES = Path(__file__).resolve().parent
REPO = FAKES.parents[1]
TIER_A, TIER_B = FAKES / "isaaclab_fake", FAKES / "kit_stub"
WHEEL = "2.3.2.post1"
DEADLINE_S = 600.0


def wheel_sources() -> list[str]:
    """Return the source folders of the installed wheel, which Kit adds to the path; empty if it is not installed."""
    try:
        if importlib.metadata.version("isaaclab") != WHEEL:
            return []
    except importlib.metadata.PackageNotFoundError:
        return []
    spec = importlib.util.find_spec("isaaclab")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return sorted(str(path) for folder in folders for path in Path(folder, "source").glob("isaaclab*"))


def environment(tier: str, **switches: str) -> dict[str, str]:
    """Return os.environ with the packages of the tier first on the path. switches: variables that the fakes read."""
    roots = [str(TIER_A)] if tier == "A" else [str(TIER_B), *wheel_sources()]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FAKE_")}
    return kept | {"PYTHONPATH": os.pathsep.join([*roots, str(REPO)]), "OMP_NUM_THREADS": "1"} | switches


def drive(
    tmp_path: Path,
    tier: str,
    task: str,
    *overrides: str,
    num_envs: int = 6,
    ticks: int = 30,
    nan: tuple[int, int] | None = None,
    **switches: str,
) -> dict[str, Any]:
    """Run the driver with the fakes of a tier, and return its result."""
    given = [f"env.name={task}", f"env.num_envs={num_envs}", "collector.eval_envs=2", *overrides]
    job = {"config": "isaaclab", "overrides": given, "ticks": ticks, "nan": nan}
    expected = 3 if "FAKE_HANG_CLOSE" in switches else 7
    return run_driver(tmp_path, job, environment(tier, **switches), expected=expected)


def run_driver(folder: Path, job: dict[str, Any], env: dict[str, str], *, expected: int = 7, cwd: Path = REPO) -> dict:
    """Run tests/fakes/isaac_driver.py and return its result.

    env: the environment variables. Raises: AssertionError if the process ends with another code than `expected`.
    """
    (folder / "job.json").write_text(json.dumps(job))
    result = folder / "result.pt"
    command = [sys.executable, str(FAKES / "isaac_driver.py"), str(folder / "job.json"), str(result)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.exists(), done.stdout[-3000:] + done.stderr[-6000:]
    assert done.returncode == expected, (done.returncode, done.stdout[-3000:], done.stderr[-6000:])
    return torch.load(result, weights_only=False) | {"stderr": done.stderr}
