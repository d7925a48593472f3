"""Write files, and lines of files, as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def private_files() -> Iterator[None]:
    """Give no rights to other users on the files that this process, and processes that it starts, create meanwhile."""
    before = os.umask(0o077)
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that readers find either the old content or the new one, also after a crash.

    The content is written to PATH.partial, flushed to the disk and renamed to PATH.

    Raises: OSError, for example if the disk is full. The old content is then unchanged and PATH.partial is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # it may fill a disk that is full already
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk. Without this, a power failure could undo a rename."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Flush a file to the disk that was written before. Raises: OSError, for example if the disk is full."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


class LineFile:
    """A file to which one process appends lines. Each line goes to the kernel at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Append one line. Raises: OSError, for example if the disk is full; no part of the line is then written."""
        raw, end = line.encode() + b"\n", os.fstat(self._file.fileno()).st_size
        written = self._file.write(raw)
        if written != len(raw):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
