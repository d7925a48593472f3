"""Create a run folder or open an earlier one, under a lock that keeps it to one launch; and the folder of its sockets."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.config import Settings
from shared.errors import SettingError
from shared.run_folder import RunFolder, checkpoint_step, newest_checkpoint


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


def check_resumable(folder: RunFolder) -> None:
    """Raises: SettingError if the folder is none of a run or holds no checkpoint."""
    if not folder.config.is_file():
        raise SettingError(
            f"{folder.path} is no run folder: it has no config.yaml; wanted a folder such as runs/NAME; mend --resume"
        )
    if newest_checkpoint(folder.checkpoints) is None:
        raise SettingError(
            f"{folder.path} has no complete checkpoint; expected a run that saved at least one; "
            "start a new run without --resume"
        )


def check_unfinished(folder: RunFolder, settings: Settings) -> None:
    """Raise SettingError if the newest checkpoint already has every gradient step that the settings ask for."""
    saved, total = newest_checkpoint(folder.checkpoints), settings.optimization.total_optim_steps
    done = checkpoint_step(saved) if saved is not None else 0
    if done >= total:
        raise SettingError(
            f"the run in {folder.path} has already made {done} of optimization.total_optim_steps={total} gradient steps; "
            f"expected a higher total; add optimization.total_optim_steps={2 * done} to go on with it"
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
