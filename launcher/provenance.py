"""The content of run.json: command line, sources, versions and devices of every launch of a run."""

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

PACKAGES = (
    "tandem-dreamer",
    "torch",
    "tensordict",
    "torchrl",
    "numpy",
    "dm_control",
    "mujoco",
    "isaaclab",
    "isaacsim",
    "mjlab",
    "gymnasium",
    "warp-lang",
    "pyzmq",
    "msgpack",
    "hydra-core",
    "omegaconf",
    "structlog",
)


def describe_run(
    settings: Settings,
    *,
    argv: list[str],
    devices: Mapping[str, str],
    run_dir: Path,
    socket_dir: Path,
    before: Run | None,
    repo: Path,
) -> dict[str, Any]:
    """Return the content of run.json: what runs, from which sources and on which devices.

    before: for a resumed run, its run.json as the previous launch wrote it. repo: the folder of our sources.
    """
    git, started = git_state(repo), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {
        "run_id": secrets.token_hex(8),
        "launches": [*(before.launches if before else ()), {"argv": argv, "started": started, "git": git}],
        "num_resumes": before.num_resumes + 1 if before else 0,
        "launch_pid": os.getpid(),
        "run_dir": str(run_dir),
        "socket_dir": str(socket_dir),
        "seed": settings.env.seed,
        "devices": dict(devices),
        "git": git,
        "versions": {"python": platform.python_version(), **package_versions()},
        "platform": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """Return the version of each installed package of PACKAGES, read from its metadata: an import would load torch."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_state(repo: Path) -> dict[str, Any] | None:
    """Return the commit of `repo` and whether files differ from it; None without git or if `repo` is no repository.

    A folder inside another repository does not count: site-packages may be in the repository of the user's project.
    """
    try:
        if Path(_git(repo, "rev-parse", "--show-toplevel")).resolve() != repo.resolve():
            return None
        return {"commit": _git(repo, "rev-parse", "HEAD"), "dirty": bool(_git(repo, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(repo: Path, *args: str) -> str:
    """Return what a git command prints. Raises: OSError or SubprocessError if git is missing or fails."""
    command = ["git", "-C", str(repo), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
