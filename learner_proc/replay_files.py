"""The rows of the replay on the disk, in segments that several checkpoints share.

A segment is a file of consecutive rows: one field after the other, each with its oldest row first. A checkpoint writes
segments only for the rows that are new since the one before it, and links the older segments (a hard link: the same
file under a second name). Example of three checkpoints, with a ring of 8 rows:

    rows that can be sampled   0..3           0..5                   4..9
    checkpoint 00000100        replay-000001  (rows 0 to 3)
    checkpoint 00000200        replay-000001  replay-000002 (4, 5)
    checkpoint 00000300                       replay-000002          replay-000003 (6 to 9)

The ring forgets its oldest rows first, so only the oldest segment holds rows that no longer count. A segment is never
changed, so a save that is killed cannot damage an older checkpoint. Where the file system has no hard links, every
checkpoint writes all rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from learner_proc.host_blocks import BLOCK_BYTES, HostBlocks
from learner_proc.replay import Replay
from shared.checkpoints import Checkpoint, DamagedError, Segment, read_manifest
from shared.errors import SettingError
from shared.stream import DTYPE_BYTES

SEGMENT_BYTES = 1 << 30  # of one segment, so that little space is lost to rows that no longer count
MAX_SMALL_SEGMENTS = 256  # more than these, beyond what the size demands: then all rows are written again


@dataclass(frozen=True)
class StoredRows:
    """A segment in a folder. It holds the rows `first` to `end` - 1, in the numbers of `Replay`.

    crc32: its checksum; None if it is new, so that the checksum is not known yet.
    """

    path: Path
    crc32: str | None
    first: int
    end: int

    @property
    def segment(self) -> Segment:
        """Return the segment as a manifest lists it."""
        return Segment(self.path.name, self.end - self.first)


class ReplayFiles:
    """Writes the rows of a replay into one checkpoint after the other, and knows which rows the last one has."""

    def __init__(self, replay: Replay, blocks: HostBlocks | None = None) -> None:
        """blocks: brings the rows to the host; None makes one."""
        self._replay = replay
        self._blocks = HostBlocks(replay.slab.device) if blocks is None else blocks
        self._stored: tuple[StoredRows, ...] = ()  # the newest whole checkpoint's, oldest first

    @property
    def num_rows(self) -> int:
        """Return the number of rows that can be sampled."""
        return self._replay.num_rows

    def fields(self) -> list[dict[str, Any]]:
        """Return name, shape and dtype of each field of a row."""
        replay = self._replay
        views = [(entry, replay.views.get(entry.key)) for entry in replay.layout.fields]
        return [{"name": entry.name, "shape": list(view.shape[1:]), "dtype": entry.dtype} for entry, view in views]

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Use the segments of the checkpoint from which the replay was filled."""
        manifest, stored, end = checkpoint.manifest, [], self._replay.num_restored
        for segment in reversed(manifest.segments):
            path = checkpoint.folder / segment.file
            stored.insert(0, StoredRows(path, manifest.files[segment.file].crc32, end - segment.rows, end))
            end -= segment.rows
        # The checksums of format 1 are not known.
        self._stored = tuple(stored) if manifest.format > 1 and self._replay.num_restored > 0 else ()

    def write(self, folder: Path) -> tuple[StoredRows, ...]:
        """Put all rows that can be sampled into a new folder, and return its segments, oldest first.

        Raises: OSError, for example if the disk is full.
        """
        replay = self._replay
        stored = self._linked(folder)
        number = 1 + max((_number(each.path) for each in stored), default=0)
        first = stored[-1].end if stored else replay.first
        step = max(1, SEGMENT_BYTES // _row_bytes(replay))
        for row in range(first, replay.committed, step):
            path = folder / f"replay-{number:06d}.bin"
            stored.append(self._write_rows(path, row, min(row + step, replay.committed)))
            number += 1
        return tuple(stored)

    def finished(self, folder: Path, stored: tuple[StoredRows, ...]) -> None:
        """Remember the segments of a checkpoint that is finished and now has the name `folder`."""
        try:
            files = read_manifest(folder).files
        except DamagedError:  # somebody deleted the folder already: the next checkpoint writes all rows
            self._stored = ()
            return
        paths = [folder / each.path.name for each in stored]
        self._stored = tuple(
            replace(each, path=path, crc32=files[path.name].crc32) for each, path in zip(stored, paths, strict=True)
        )

    def _linked(self, folder: Path) -> list[StoredRows]:
        """Link the segments that still hold rows that can be sampled. Return none if all rows must be written again."""
        replay = self._replay
        still = [each for each in self._stored if each.end > replay.first]
        row_bytes = _row_bytes(replay)
        live_bytes = replay.num_rows * row_bytes
        if len(still) > MAX_SMALL_SEGMENTS + 2 * live_bytes // SEGMENT_BYTES:
            return []
        linked = []
        try:
            for each in still:
                path = folder / each.path.name
                os.link(each.path, path)
                linked.append(replace(each, path=path))
                if path.stat().st_size != each.segment.rows * row_bytes:
                    raise OSError(f"{each.path} was changed")
        except OSError:  # no hard links here, or somebody deleted or cut the file
            for path in folder.glob("replay-*"):
                path.unlink()
            return []
        return linked

    def _write_rows(self, path: Path, first: int, end: int) -> StoredRows:
        """Write a segment block by block, so that no copy of a full ring is needed."""
        replay, capacity = self._replay, self._replay.layout.capacity
        start = first % capacity
        stop = start + end - first
        spans = [(start, min(stop, capacity))] + ([(0, stop - capacity)] if stop > capacity else [])
        views = [replay.views.get(entry.key) for entry in replay.layout.fields]
        with path.open("xb") as file:
            for block in self._blocks.read(view[a:b] for view in views for a, b in spans):
                file.write(block.numpy().data)
        return StoredRows(path, None, first, end)


def load_replay(
    checkpoint: Checkpoint, replay: Replay, *, spec_digest: str, on_block: Callable[[], None] = lambda: None
) -> int:
    """Fill the ring from a verified checkpoint and return the number of rows. A smaller ring gets the newest rows.

    on_block: called for each block that was read, to report progress.
    Raises: SettingError if the checkpoint was written for another stream, or if a segment is too short.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    if manifest.spec_digest != spec_digest:
        raise SettingError(
            f"{folder} was written for stream {manifest.spec_digest}; expected stream {spec_digest}, with the "
            "observations, actions and number of environments of this run; "
            "undo the overrides of env.* or start a new run"
        )
    num_rows = min(manifest.replay_rows, replay.layout.capacity)
    num_rows -= num_rows % replay.ticks_per_chunk
    skip = sum(segment.rows for segment in manifest.segments) - num_rows
    row = 0
    for segment in manifest.segments:
        left_out = min(skip, segment.rows)
        skip -= left_out
        if left_out < segment.rows:
            _read_segment(folder / segment.file, segment.rows, left_out, replay, row, on_block)
            row += segment.rows - left_out
    if num_rows > 0:
        replay.restore(num_rows)
    return num_rows


def _read_segment(
    path: Path, num_rows: int, left_out: int, replay: Replay, row: int, on_block: Callable[[], None]
) -> None:
    """Read all but the first `left_out` rows of a segment into the ring, from ring row `row` on."""
    offset = 0
    for entry in replay.layout.fields:
        target = replay.views.get(entry.key)
        row_bytes = math.prod(target.shape[1:]) * DTYPE_BYTES[entry.dtype]
        rows = target[row : row + num_rows - left_out]
        _read_rows(path, offset + left_out * row_bytes, rows, row_bytes, on_block)
        offset += num_rows * row_bytes


def _read_rows(path: Path, offset: int, target: torch.Tensor, row_bytes: int, on_block: Callable[[], None]) -> None:
    """Read rows from a byte offset of the file into `target`, block by block. Raises: SettingError."""
    step = max(1, BLOCK_BYTES // row_bytes)
    with path.open("rb") as file:
        file.seek(offset)
        for row in range(0, len(target), step):
            part = target[row : row + step]
            raw = bytearray(file.read(len(part) * row_bytes))
            if len(raw) != part.nbytes:
                raise SettingError(
                    f"{path} ends after {file.tell()} bytes, in the middle of the replay; expected every row that "
                    f"the manifest counts; delete {path.parent} to continue from an older checkpoint"
                )
            on_block()
            part.copy_(torch.frombuffer(raw, dtype=target.dtype).view(part.shape))


def _row_bytes(replay: Replay) -> int:
    """Return the bytes of one row of all environments."""
    fields = replay.layout.fields
    return sum(math.prod(replay.views.get(f.key).shape[1:]) * DTYPE_BYTES[f.dtype] for f in fields)


def _number(path: Path) -> int:
    """Return the number in the name of a segment."""
    return int(path.stem.rpartition("-")[2])
