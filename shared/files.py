"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file at once: a reader, or a crash at any instant, finds the old content or the new, never a part.

    The content is written to PATH.partial, flushed to the disk and renamed. Raises: OSError, for example if the disk is
    full; the old file is then still there.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it, a power failure could undo the rename
    finally:
        os.close(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_atomic` does."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")
