"""Create a run folder, or open the folder of an earlier run, under a lock that admits one launch at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.checkpoints import MANIFEST, damaged_checkpoints, newest_checkpoint, newest_verified, settle
from shared.config import Settings
from shared.errors import SettingError
from shared.files import write_atomic
from shared.run_folder import RunFolder

EARLIER = "earlier-"  # the subfolders with the files of attempts that saved no checkpoint


class RunIsComplete(SettingError):
    """A run that is to be resumed has made all its gradient steps."""


@dataclass
class RunLock:
    """A locked run folder; use it as a context manager. If launch is killed, the kernel releases the lock."""

    folder: RunFolder
    file: IO[str]

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        self.file.close()


class ResumeUndo:
    """The small files of a run folder as they were before a resume, to be restored if the resume trained nothing.

    The new config.yaml and run.json must be written before the collector and the learner start, because both read them.
    If the learner then refuses, for example, an override, the old files still describe the checkpoint that is there.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        files = (folder.config, folder.run_json, folder.summary)
        self._contents = {path: path.read_bytes() for path in files if path.is_file()}
        self._saved_at = self._newest_save()

    def unless_saved(self) -> None:
        """Restore the files, unless a checkpoint was written since: it was trained with the new settings."""
        if self._newest_save() == self._saved_at:
            for path, content in self._contents.items():
                write_atomic(path, content)

    def _newest_save(self) -> int | None:
        """Return when the newest checkpoint was written, in ns."""
        saved = newest_checkpoint(self._folder.checkpoints)
        return (saved.folder / MANIFEST).stat().st_mtime_ns if saved is not None else None


def make_default_run_dir(settings: Settings, root: Path = Path("runs")) -> Path:
    """Make the folder `runs/ENV-TASK-YYYYMMDD-HHMMSS` and return it. If it exists, a counter is appended to its name.

    Raises: SettingError if it cannot be made.
    """
    words = [word for word in (settings.env.name, settings.env.task, time.strftime("%Y%m%d-%H%M%S")) if word]
    name = "-".join("".join(c if c.isalnum() or c in "-_." else "_" for c in word) for word in words)
    path, number = root / name, 1
    while not _made(path):
        number += 1
        path = root / f"{name}-{number}"
    return path


def _made(path: Path) -> bool:
    """Make a folder and return True, or return False if it exists: another launch may have made it a moment ago."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot("create", path, error) from error
    return True


def has_checkpoint(path: Path) -> bool:
    """Return whether a folder holds a run that can be continued.

    Raises: SettingError if the run has checkpoints and none of them is whole: to begin again would hide that loss.
    """
    folder = RunFolder(path.resolve())
    if damaged_checkpoints(folder.checkpoints):
        check_resumable(folder)
    return newest_checkpoint(folder.checkpoints) is not None


def create_run_folder(path: Path, *, set_aside: bool = False) -> RunLock:
    """Return a new run folder with its subfolders, locked.

    set_aside: if the folder holds a run that saved no checkpoint, move its files into the subfolder `earlier-1` (or a
    higher number).
    Raises: SettingError if the folder cannot be created, contains files already, or is locked by another launch.
    """
    try:
        folder = RunFolder(path.resolve())
        had_lock = folder.lock.exists()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder)
        if set_aside and folder.config.is_file() and newest_checkpoint(folder.checkpoints) is None:
            _set_aside(folder)
        ours = {folder.lock.name, *(earlier.name for earlier in folder.path.glob(f"{EARLIER}*") if set_aside)}
        found = sorted(entry.name for entry in folder.path.iterdir() if entry.name not in ours)
    except OSError as error:
        raise _cannot("create", path, error) from error
    if found:
        lock.release()
        if not had_lock:
            folder.lock.unlink(missing_ok=True)
        raise SettingError(
            f"the run folder {path} is not empty: it contains {', '.join(found[:3])}; expected a new or empty folder; "
            f"give --resume {path} to continue that run, or another --run-dir"
        )
    _make_subfolders(folder)
    return lock


def discard_run_folder(folder: RunFolder) -> None:
    """Remove a run folder in which nothing could be started. The files of earlier attempts stay."""
    if not any(folder.path.glob(f"{EARLIER}*")):
        shutil.rmtree(folder.path, ignore_errors=True)
        return
    for entry in folder.path.iterdir():
        if entry.is_dir() and not entry.name.startswith(EARLIER):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_file() and entry != folder.lock:
            entry.unlink(missing_ok=True)


def _set_aside(folder: RunFolder) -> None:
    """Move the files of an attempt that saved no checkpoint into a subfolder of their own."""
    found = [entry for entry in folder.path.iterdir() if entry != folder.lock and not entry.name.startswith(EARLIER)]
    number = 1
    while (folder.path / f"{EARLIER}{number}").exists():
        number += 1
    earlier = folder.path / f"{EARLIER}{number}"
    earlier.mkdir()
    # config.yaml moves last: if this is interrupted, the next attempt moves the rest.
    for entry in sorted(found, key=lambda entry: entry == folder.config):
        entry.rename(earlier / entry.name)


def _cannot(verb: str, path: Path, error: OSError) -> SettingError:
    """Return the error for a run folder that cannot be created or opened."""
    fix = "give another --run-dir" if verb == "create" else "correct the file that the error names"
    return SettingError(
        f"cannot {verb} the run folder {path}: {error}; expected a folder in which this user may write; {fix}"
    )


def open_run_folder(path: Path) -> RunLock:
    """Return the folder of an earlier run, locked, to continue that run. Its newest checkpoint is read and verified.

    Raises: SettingError if it is not a run folder, has no checkpoint, is locked by another launch, or is not writable.
    """
    try:
        folder = RunFolder(path.resolve())
        if not folder.config.is_file():
            raise SettingError(
                f"{folder.path} is not a run folder: it has no config.yaml; expected a folder such as runs/NAME; "
                "correct the folder after --resume"
            )
        lock = _take_lock(folder)
        try:
            _make_subfolders(folder)
            settle(folder.checkpoints)
            check_resumable(folder)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise _cannot("open", path, error) from error
    return lock


def check_resumable(folder: RunFolder) -> None:
    """Raise SettingError if the run folder has no whole checkpoint."""
    if newest_verified(folder.checkpoints) is None:
        damaged = "".join(f"; {path} is damaged: {damage}" for path, damage in damaged_checkpoints(folder.checkpoints))
        raise SettingError(
            f"{folder.path} has no whole checkpoint{damaged}; expected a run that saved at least one; "
            "start a new run without --resume"
        )


def check_unfinished(folder: RunFolder, settings: Settings) -> None:
    """Raise RunIsComplete if the newest checkpoint already has every gradient step that the settings ask for."""
    saved, total = newest_checkpoint(folder.checkpoints), settings.optimization.total_optim_steps
    done = saved.manifest.step if saved is not None else 0
    if done >= total:
        raise RunIsComplete(
            f"the run in {folder.path} has made {done} of optimization.total_optim_steps={total} gradient steps; "
            f"expected a higher total; add optimization.total_optim_steps={2 * done} to continue it"
        )


def _take_lock(folder: RunFolder) -> RunLock:
    """Lock the folder and write our pid into the lock file. Raises: SettingError if another launch has the lock."""
    file = folder.lock.open("a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        pid = file.read(100).strip()
        file.close()
        user, stop = "another launch", ""
        if pid.isdecimal():
            user, stop = f"the launch with pid {pid}", f"stop it with 'kill {pid}', "
        raise SettingError(
            f"the run folder {folder.path} is in use by {user}; expected a folder that no other launch uses; "
            f"wait for that run, {stop}or give another --run-dir"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return RunLock(folder, file)


def _make_subfolders(folder: RunFolder) -> None:
    for path in (folder.logs, folder.tensorboard, folder.checkpoints, folder.crash):
        path.mkdir(exist_ok=True)
