"""Gathers rows into chunks and copies every full chunk into the learner's replay, with one copy per field.

On a GPU the rows are gathered in two buffers: while one chunk is copied, the next one is gathered in the other buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from collector_proc.copies import CompletedCopy, Copier, Copy, DoubleBuffer, copier_between
from collector_proc.simulators.base import Arrival
from shared.checksum import BLOCK_BYTES, checksum
from shared.stream import Layout


class ChunkWriter:
    """Gathers K rows on the acting device, and writes them into the ring with one contiguous copy per field.

    ring: TensorDict [T_cap] of views of the learner's replay memory (`shared.stream.ring_views`). ticks: K.
    copier: None chooses the one that fits the acting device and the ring's device.
    """

    def __init__(
        self, ring: TensorDict, layout: Layout, *, ticks: int, device: torch.device, copier: Copier | None = None
    ) -> None:
        self._ring, self.ticks = ring, ticks
        self.copier = copier or copier_between(device, ring.device)
        self._keys = [entry.key for entry in layout.fields]

        def make_buffer() -> dict[tuple[str, ...], Tensor]:
            return {
                key: torch.zeros((ticks, *layout.shape(entry)[1:]), dtype=getattr(torch, entry.dtype), device=device)
                for key, entry in zip(self._keys, layout.fields, strict=True)
            }

        self._buffers = DoubleBuffer(self.copier, make_buffer)
        self._copy: Copy = CompletedCopy()  # of the chunk that was written last
        self.num_rows = 0  # gathered so far

    @property
    def full(self) -> bool:
        """Return whether all rows of the chunk are gathered."""
        return self.num_rows == self.ticks

    @property
    def rows(self) -> dict[tuple[str, ...], Tensor]:
        """The rows of the chunk that is being gathered, (K, ...) for each field, by the field's key."""
        return self._buffers.current

    def add(self, arrival: Arrival, action: Tensor, policy_version: int) -> None:
        """Gather one row. action: (E, A), the executed action that led to the arrival, 0 at `is_first`."""
        k, rows = self.num_rows, self.rows
        for name, entry in arrival.obs.items():
            rows["obs", name][k].copy_(entry, non_blocking=True)
        row = {"action": action, "reward": arrival.reward, "is_first": arrival.is_first}
        row |= {"is_last": arrival.is_last, "is_terminal": arrival.is_terminal}
        for name, entry in row.items():
            rows[name,][k].copy_(entry, non_blocking=True)
        rows["policy_version",][k].fill_(policy_version)
        self.num_rows += 1

    def write(self, row: int) -> None:
        """Start to copy the gathered chunk to the ring's rows row..row+K-1, and begin a new chunk.

        On a GPU the copies are complete once `done` returns True; on a CPU they are complete when this returns.
        """
        assert self.full, (self.num_rows, self.ticks)
        gathered, granted = self.rows, slice(row, row + self.ticks)
        self._copy = self._buffers.send([(self._ring[key][granted], gathered[key]) for key in self._keys])
        self.num_rows = 0

    def done(self) -> bool:
        """Return whether everything written so far is complete in the ring. This never blocks."""
        return self._copy.done()

    def wait(self) -> None:
        """Block the host until everything written so far is complete in the ring."""
        self._copy.wait()

    def forget_ring(self) -> None:
        """Stop referring to the ring, so that its memory can be unmapped. Nothing can be written afterwards."""
        del self._ring

    def checksum(self) -> int:
        """Return the checksum of the gathered chunk. The learner compares it with that of the rows in its memory."""
        return checksum(self.rows[key] for key in self._keys)

    def write_pattern(
        self, row: int, *, nonce: int = 0, wait: Callable[[], None] | None = None
    ) -> tuple[int, int, float]:
        """Fill every buffer with a pattern and write it like a chunk.

        nonce: selects one of 502 patterns, so that bytes of an earlier test hardly ever pass. wait: blocks until the
        copies are complete; the default is `self.wait`.
        The result is the pattern's checksum, its bytes, and the seconds of the fastest of three writes.
        """
        wait = wait or self.wait
        for entry in (entry for buffer in self._buffers.buffers for entry in buffer.values()):
            flat = entry.view(-1).view(torch.uint8)
            for start in range(0, flat.numel(), BLOCK_BYTES):
                block = flat[start : start + BLOCK_BYTES]
                pattern = torch.arange(start, start + block.numel(), device=flat.device) + nonce
                block.copy_(pattern % 2 if entry.dtype == torch.bool else pattern % 251)
        num_bytes = sum(entry.nbytes for entry in self.rows.values())
        expected, seconds = self.checksum(), []
        for _ in range(3):  # the first write is slower, because it maps the pages
            started, self.num_rows = time.perf_counter(), self.ticks
            self.write(row)
            wait()
            seconds.append(time.perf_counter() - started)
        return expected, num_bytes, min(seconds)
