"""The run folder `runs/<name>/`: where each file lies, the lock that keeps it to one launch, and run.json.

    config.yaml run.json lock | collector.progress learner.progress | logs/ tb/ checkpoints/ crash/
    metrics.jsonl (learner)   | summary.json (at the end)

Outside it lies only the socket folder: ipc paths end at 107 bytes, so sockets need a short path of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SettingError

SOCKET_PREFIX = "tandem-"
# 107 bytes end an AF_UNIX path; a socket's own name and its slash take at most this much of them.
MAX_SOCKET_DIR_BYTES = 107 - 24


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


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint, or None if there is none.

    Normally it is the folder that the file `latest` names. A learner that was killed while it saved may leave `latest`
    pointing at a folder that is missing or incomplete. Then it is the complete folder of the highest step. A folder is
    complete if it has a manifest.json, which is written last.
    """
    latest = checkpoints / "latest"
    if latest.exists():
        named = checkpoints / latest.read_text().strip()
        if (named / "manifest.json").exists():
            return named
    complete = [manifest.parent for manifest in checkpoints.glob("*/manifest.json")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of gradient steps that were done when a complete checkpoint was written."""
    return json.loads((checkpoint / "manifest.json").read_text())["step"]


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
