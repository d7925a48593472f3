"""Make written files a checkpoint: checksums, flushes to the disk, manifest, name, and deletion of old checkpoints.

Reading the files for their checksums and flushing them takes seconds, so a process of its own does it while the learner
trains on (`Finisher`). It is torch-free, ends with the learner, and ignores the signals that ask a run to end: the
learner waits for it then. Its input is one JSON object. Its output is one "." for each block that it read, then a line
with the result as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from learner_proc.retention import delete_others
from shared.checkpoints import (
    CheckpointError,
    Manifest,
    StoredFile,
    file_crc32,
    free_folder,
    manifest_of,
    newest_checkpoint,
    write_manifest,
)
from shared.config import CheckpointSettings
from shared.files import sync_file, sync_folder, write_atomic
from shared.lifetime import die_with_parent


def finish(
    partial: Path, manifest: Manifest, options: CheckpointSettings, *, on_block: Callable[[], None] = lambda: None
) -> Path:
    """Make the files in `partial` a checkpoint and return its folder. Then delete what `options` does not keep.

    manifest: complete but for the checksums of new files, which are None. on_block: called for each block that is read.
    Raises: CheckpointError if it cannot be finished. Nothing of it is left then.
    """
    root = partial.parent
    try:
        files = dict(manifest.files)
        for name, file in manifest.files.items():
            if file.crc32 is None:
                files[name] = StoredFile(file.size, file_crc32(partial / name, on_block=on_block))
                sync_file(partial / name)
                on_block()
        write_manifest(partial, replace(manifest, files=files))
        final = free_folder(root, manifest.step)
        partial.rename(final)
        sync_folder(root)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # it may fill a disk that is full already
        if isinstance(error, OSError):
            raise failure(root, manifest.step, str(error)) from error
        raise
    _name_latest(root, final)
    delete_others(root, options)
    return final


def failure(root: Path, step: int, cause: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be written."""
    last = newest_checkpoint(root)
    kept = "there is no earlier one" if last is None else f"the last one is of step {last.manifest.step}"
    return CheckpointError(
        f"the checkpoint of step {step} could not be saved, {kept}: {cause}; expected a disk with free space at "
        f"{root}; free some of it"
    )


class Finisher:
    """Runs `finish` in a process of its own."""

    def __init__(self, partial: Path, manifest: Manifest, options: CheckpointSettings) -> None:
        """Start it. Raises: CheckpointError if no process can be started; nothing of the checkpoint is left then."""
        self._partial, self._step, self._output = partial, manifest.step, b""
        request = {"partial": str(partial), "manifest": asdict(manifest), "options": asdict(options)}
        command = [sys.executable, "-m", "learner_proc.finishing", str(os.getpid())]
        try:
            # In a session of its own, it does not get the signals of the terminal, such as Ctrl-C.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            with self._process.stdin as stdin:
                stdin.write(json.dumps(request).encode())
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise failure(partial.parent, manifest.step, str(error)) from error
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def poll(self, *, on_block: Callable[[], None] = lambda: None) -> Path | None:
        """Return the folder of the checkpoint, or None while the process works. Does not wait.

        on_block: called if the process has moved since the last call.
        Raises: CheckpointError if it failed. Nothing of the checkpoint is left then.
        """
        ended = self._process.poll() is not None
        with suppress(BlockingIOError):
            while read := os.read(self._stdout.fileno(), 1 << 16):
                self._output += read
                on_block()
        if not ended:
            return None
        self._stdout.close()
        return self._result()

    def wait(self, *, on_block: Callable[[], None] = lambda: None) -> Path:
        """Wait for the end of the process and return the folder of the checkpoint. Otherwise the same as `poll`."""
        while True:
            folder = self.poll(on_block=on_block)
            if folder is not None:
                return folder
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)

    def _result(self) -> Path:
        """Return the folder that the process reported. Raises: CheckpointError if it reported none."""
        line = self._output.rpartition(b"\n")[2]
        result: Mapping[str, Any] = json.loads(line) if line.startswith(b"{") else {}
        if "folder" in result:
            return Path(result["folder"])
        shutil.rmtree(self._partial, ignore_errors=True)
        if "error" in result:
            raise CheckpointError(result["error"])
        cause = f"the process that flushes it ended with exit code {self._process.returncode}"
        raise failure(self._partial.parent, self._step, cause)


def main() -> None:
    """Do what stdin asks for. The argument is the pid of the learner."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent(int(sys.argv[1]))
    with suppress(OSError):
        os.nice(5)  # a simulator that steps on the same cores comes first
    request = json.load(sys.stdin)
    partial, options = Path(request["partial"]), CheckpointSettings(**request["options"])
    try:
        folder = finish(partial, manifest_of(request["manifest"]), options, on_block=lambda: _write("."))
        result = {"folder": str(folder)}
    except CheckpointError as error:
        result = {"error": str(error)}
    _write("\n" + json.dumps(result))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _name_latest(root: Path, final: Path) -> None:
    """Let `latest` name the newest checkpoint. Tandem does not read it, so a failure is no reason to fail."""
    latest = root / "latest"
    with suppress(OSError):
        if latest.is_dir() and not latest.is_symlink():
            shutil.rmtree(latest)
        write_atomic(latest, final.name)


if __name__ == "__main__":
    main()
