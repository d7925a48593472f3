"""Write a file of a checkpoint and compute its checksum on the way."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO

from shared.checkpoints import StoredFile


class FileWriter:
    """A new file; use it as a context manager. At the end of the context, its content is on the disk.

    `stored` then has its size and checksum. Raises: OSError, for example if the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._size = self._crc = 0

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, error_type: object, *error: object) -> None:
        try:
            if error_type is None:
                self.sync()
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Write all bytes and return their number."""
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: `sync` flushes. `torch.save` expects this method."""

    def sync(self) -> None:
        """Flush what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def stored(self) -> StoredFile:
        """Return size and checksum of what was written."""
        return StoredFile(self._size, f"{self._crc:08x}")
