"""What run.json says of a launch: command line, sources, versions, devices."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.config import Settings
from shared.run_folder import Run

_PACKAGES = (
    "torch",
    "tensordict",
    "torchrl",
    "numpy",
    "dm_control",
    "mujoco",
    "isaaclab",
    "mjlab",
    "pyzmq",
    "msgpack",
    "hydra-core",
    "omegaconf",
    "structlog",
)


def describe_run(
    settings: Settings, *, argv: list[str], devices: Mapping[str, str], socket_dir: Path, before: Run | None, repo: Path
) -> dict[str, Any]:
    """The content of run.json: what ran, from which sources, on what. before: of a resumed run, its last description."""
    git, started = git_state(repo), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {
        "run_id": secrets.token_hex(8),
        "launches": [*(before.launches if before else ()), {"argv": argv, "started": started, "git": git}],
        "num_resumes": before.num_resumes + 1 if before else 0,
        "launch_pid": os.getpid(),
        "socket_dir": str(socket_dir),
        "seed": settings.env.seed,
        "devices": dict(devices),
        "git": git,
        "versions": {"python": platform.python_version(), **package_versions()},
        "platform": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """Versions of installed packages, from their metadata: importing them would import torch."""
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_state(repo: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None without git or outside a repository."""
    try:
        commit = _git(repo, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(repo, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(repo: Path, *args: str) -> str:
    command = ["git", "-C", str(repo), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
