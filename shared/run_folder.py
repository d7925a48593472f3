"""The run folder `runs/<name>/`: where each file lies, the lock that keeps it to one launch, and run.json.

    config.yaml run.json lock | collector.progress learner.progress | logs/ tb/ checkpoints/ crash/
    metrics.jsonl (learner)   | summary.json (at the end)

Outside it lies only the socket folder: ipc paths end at 107 bytes, so sockets need a short path of their own.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from shared.config import Settings
from shared.errors import SettingError

SOCKET_PREFIX = "tandem-"
# 107 bytes end an AF_UNIX path; a socket's own name and its slash take at most this much of them.
MAX_SOCKET_DIR_BYTES = 107 - 24
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


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def crash(self) -> Path:
        return self.path / "crash"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def progress(self, process: str) -> Path:
        return self.path / f"{process}.progress"


@dataclass(frozen=True)
class Run:
    """What both processes need from run.json."""

    run_id: str  # one for each launch, so that nothing of an earlier one is taken for ours
    socket_dir: str
    num_resumes: int = 0  # part of the collectors' seeds: a resumed run does not play its first episodes again
    launches: tuple[dict[str, Any], ...] = ()  # argv, start and sources of every launch so far


def read_run(run_dir: Path) -> Run:
    """Raises: SettingError if run.json is missing or says no run id or socket folder."""
    path = RunFolder(run_dir).run_json
    try:
        content = json.loads(path.read_text())
        return Run(
            str(content["run_id"]),
            str(content["socket_dir"]),
            int(content.get("num_resumes", 0)),
            tuple(dict(launch) for launch in content.get("launches") or [_first_launch(content)]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path} cannot be read: {error!r}; wanted run_id and socket_dir as launch writes them; start with launch.py"
        ) from error


def _first_launch(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run that was described before launches were listed."""
    return {key: content[key] for key in ("argv", "started", "git") if key in content}


@dataclass(frozen=True)
class Kept:
    """What a run's small files held, to be put back where a resume came to nothing."""

    contents: Mapping[Path, str]

    @classmethod
    def of(cls, folder: RunFolder) -> Kept:
        """Settings, description and summary as they stand now, of those that exist."""
        files = (folder.config, folder.run_json, folder.summary)
        return cls({path: path.read_text() for path in files if path.exists()})

    def put_back(self) -> None:
        for path, content in self.contents.items():
            path.write_text(content)


@dataclass
class RunLock:
    """Held while `file` is open; the kernel lets go when launch ends, however it ends."""

    folder: RunFolder
    file: IO[str]

    def release(self) -> None:
        self.file.close()


def default_run_dir(settings: Settings, root: Path = Path("runs")) -> Path:
    """`runs/<env>-<task>-<yyyymmdd-hhmmss>`, with a counter behind it where that second is taken."""
    words = [word for word in (settings.env.name, settings.env.task, time.strftime("%Y%m%d-%H%M%S")) if word]
    name = "-".join("".join(c if c.isalnum() or c in "-_." else "_" for c in word) for word in words)
    candidate, number = root / name, 2
    while candidate.exists():
        candidate, number = root / f"{name}-{number}", number + 1
    return candidate


def create_run_folder(path: Path) -> RunLock:
    """A new run folder with its subfolders, locked.

    Raises: SettingError if another launch holds it, if it holds files already, or if it cannot be made.
    """
    folder = RunFolder(path.resolve())
    had_lock = folder.lock.exists()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder)
    except OSError as error:
        raise SettingError(
            f"the run folder {path} cannot be made: {error}; wanted a folder this user may write; pass another --run-dir"
        ) from error
    found = sorted(entry.name for entry in folder.path.iterdir() if entry != folder.lock)
    if found:
        lock.release()
        if not had_lock:
            folder.lock.unlink(missing_ok=True)
        raise SettingError(
            f"the run folder {path} is not empty (it holds {', '.join(found[:3])}); wanted a new or empty folder; "
            f"pass --resume {path} to go on with that run, or another --run-dir"
        )
    _make_subfolders(folder)
    return lock


def open_run_folder(path: Path) -> RunLock:
    """The folder of an earlier run, locked, to go on with it.

    Raises: SettingError if it is no run folder, has no checkpoint, or another launch holds it.
    """
    folder = RunFolder(path.resolve())
    check_resumable(folder)
    lock = _take_lock(folder)
    _make_subfolders(folder)
    return lock


def newest_checkpoint(folder: RunFolder) -> str | None:
    """The name of the newest checkpoint, None before the first."""
    latest = folder.checkpoints / "latest"
    return latest.read_text() if latest.exists() else None


def check_resumable(folder: RunFolder) -> None:
    """Raises: SettingError if the folder is none of a run or holds no checkpoint."""
    if not folder.config.is_file():
        raise SettingError(
            f"{folder.path} is no run folder: it has no config.yaml; wanted a folder such as runs/NAME; mend --resume"
        )
    if not (folder.checkpoints / "latest").exists():
        raise SettingError(
            f"{folder.path} has no checkpoint: checkpoints/latest is missing; wanted a run that saved at least once; "
            f"start a new run instead of --resume"
        )


def check_unfinished(folder: RunFolder, settings: Settings) -> None:
    """Raises: SettingError if the newest checkpoint already has every gradient step the settings ask for."""
    done, total = int((folder.checkpoints / "latest").read_text()), settings.optimization.total_optim_steps
    if done >= total:
        raise SettingError(
            f"{folder.path} has already made {done} gradient steps, optimization.total_optim_steps={total}; wanted steps "
            f"still to do; add optimization.total_optim_steps={2 * done} to go on"
        )


def _take_lock(folder: RunFolder) -> RunLock:
    file = folder.lock.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        file.close()
        raise SettingError(
            f"the run folder {folder.path} is in use by the launch with pid {pid}; wanted a folder of its own for every "
            f"launch; wait for that run, stop it with 'kill {pid}', or pass another --run-dir"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return RunLock(folder, file)


def _make_subfolders(folder: RunFolder) -> None:
    for path in (folder.logs, folder.tensorboard, folder.checkpoints, folder.crash):
        path.mkdir(exist_ok=True)


def make_socket_dir() -> Path:
    """A fresh folder only this user may enter (0700), short enough for socket paths. The caller removes it."""
    # A cluster's TMPDIR may be longer than a socket path can be; /tmp is there on every Linux.
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + len(SOCKET_PREFIX) + 9 <= MAX_SOCKET_DIR_BYTES and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=parent))
    raise SettingError(
        f"no folder for sockets: TMPDIR={tempfile.gettempdir()} is too long or closed and /tmp is closed; wanted a "
        f"writable path under {MAX_SOCKET_DIR_BYTES - 17} bytes; set TMPDIR"
    )


def remove_socket_dir(path: Path) -> None:
    """Remove a folder made by `make_socket_dir`, and nothing else."""
    if path.name.startswith(SOCKET_PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


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
