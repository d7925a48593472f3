"""The replay ring and its sampler.

Rows are counted from the start of the run; their number never wraps. Row n is stored in ring row n % T_cap. Example
with T_cap = 8 and chunks of K = 2 rows, of which two are granted:

    row        0  1  2  3  4  5  6  7  8  9          rows 8 9 will overwrite rows 0 1, in ring rows 0 1
                     |<- sampled  ->|<- granted->|
                    first         committed    promised

`grant()` increases `promised`, and also `first`, so that rows cannot be sampled any more before they are overwritten.
`commit()` increases `committed`. `revoke()` takes back the grants of a collector that has disconnected; what it wrote
could never be sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from learner_proc.row_bounds import RowBounds
from shared.stream import Layout, ring_views


class Replay:
    """T_cap rows of E environments in one slab of memory, sampled as windows of consecutive rows."""

    def __init__(
        self,
        slab: Tensor,
        layout: Layout,
        *,
        ticks_per_chunk: int,
        seed: int,
        device: torch.device,
        columns: Sequence[int] | None = None,
        max_deviation: float | None = None,
    ) -> None:
        """Use the slab as an empty ring.

        slab: uint8 (layout.num_bytes,), on the train device or in host memory. device: where samples are put. seed: of
        the sampler's random generator. columns: the environments to sample from; None means all of them. max_deviation:
        see `RowBounds`.
        """
        assert layout.capacity % ticks_per_chunk == 0, (layout.capacity, ticks_per_chunk)
        self.slab, self.layout, self.ticks_per_chunk, self.device = slab, layout, ticks_per_chunk, device
        self.views = ring_views(slab, layout)
        self.row_bounds = RowBounds(layout, slab.device, max_deviation=max_deviation)
        self.generator = torch.Generator(slab.device).manual_seed(seed)
        self.first = self.committed = self.promised = 0
        self.columns = None if columns is None else torch.tensor(columns, dtype=torch.int64, device=slab.device)
        self.num_restored = 0  # rows 0 to this were filled from a checkpoint
        self._granted: deque[int] = deque()
        self._bounds = torch.zeros(2, dtype=torch.int64, device=slab.device)  # `first`, `num_rows`
        self._flat: dict[tuple[str, ...], Tensor] = {
            entry.key: self.views.get(entry.key).flatten(0, 1 if entry.per_env else 0) for entry in layout.fields
        }
        self._per_env = {entry.key: entry.per_env for entry in layout.fields}
        self._staging = _HostStaging() if slab.device.type != device.type else None

    @property
    def num_rows(self) -> int:
        """Return the number of rows, for each environment, that can be sampled."""
        return self.committed - self.first

    @property
    def num_granted(self) -> int:
        """Return the number of chunks that are granted and not yet committed."""
        return len(self._granted)

    def grant(self) -> int:
        """Exclude the next K rows from sampling and return their first ring row.

        On a GPU, gradient steps that are queued already may still sample these rows. Send the grant to the collector
        only once the GPU has passed this point of the stream.
        """
        row = self.promised
        self.promised += self.ticks_per_chunk
        self.first = max(self.first, self.promised - self.layout.capacity)
        self._granted.append(row)
        self._publish_bounds()
        return row % self.layout.capacity

    def commit(self, row: int) -> TensorDict:
        """Make the oldest granted chunk available for sampling and return views of its K rows.

        First, numbers that are not finite or absurd are replaced in them (`learner_proc.row_bounds`).
        Raises: ValueError if `row` is not the ring row of the oldest grant.
        """
        expected = self._granted[0] % self.layout.capacity if self._granted else None
        if row != expected:
            raise ValueError(f"ring row {row} was committed; expected {expected}, the oldest grant")
        chunk = self.chunk(row)
        self.row_bounds.apply(chunk)
        self.committed = self._granted.popleft() + self.ticks_per_chunk
        self._publish_bounds()
        return chunk

    def revoke(self) -> None:
        """Take all grants back. Their rows are granted again next."""
        self._granted.clear()
        self.promised = self.committed

    def chunk(self, row: int) -> TensorDict:
        """Return views of the K rows that start at ring row `row`."""
        return self.views[row : row + self.ticks_per_chunk]

    def sample(self, num_sequences: int, length: int, *, generator: torch.Generator | None = None) -> TensorDict:
        """Return windows that are drawn uniformly over the sampled environments and first rows.

        A window never contains a granted row; it may contain the newest committed one. generator: use it instead of the
        generator that training uses. Does not synchronise.

        Shapes: TensorDict [B, L] of every field; `policy_version` (B, L).
        """
        assert self.num_rows >= length, (self.num_rows, length)
        return self.draw(num_sequences, length, generator=generator)

    def draw(self, num_sequences: int, length: int, *, generator: torch.Generator | None = None) -> TensorDict:
        """Do what `sample` does, but read the bounds from the device, so that a CUDA graph can capture it.

        If the ring holds fewer than `length` rows, the result has no meaning.
        """
        device, generator = self.slab.device, generator or self.generator
        first, num_rows = self._bounds[0], self._bounds[1]
        # A float random number is biased for more than 2^24 rows, and randint accepts no tensor as its bound. The rest
        # of a division of a number below 2^62 has a bias below 1e-9.
        start = torch.randint(0, 2**62, (num_sequences, 1), device=device, generator=generator)
        start = start % (num_rows - length + 1)
        num_envs = self.layout.num_envs if self.columns is None else len(self.columns)
        env = torch.randint(0, num_envs, (num_sequences, 1), device=device, generator=generator)
        env = env if self.columns is None else self.columns[env]
        rows = (first + start + torch.arange(length, device=device)) % self.layout.capacity  # (B, L)
        index = {True: (rows * self.layout.num_envs + env).view(-1), False: rows.view(-1)}
        batch = {key: flat.index_select(0, index[self._per_env[key]]) for key, flat in self._flat.items()}
        if self._staging is not None:
            batch = self._staging.move(batch, self.device)
        shaped = {key: value.view(num_sequences, length, *value.shape[1:]) for key, value in batch.items()}
        obs = {key[1]: value for key, value in shaped.items() if len(key) == 2}
        rest = {key[0]: value for key, value in shaped.items() if len(key) == 1}
        return TensorDict({"obs": TensorDict(obs, [num_sequences, length]), **rest}, [num_sequences, length])

    def vectors(self, rows: TensorDict, device: torch.device) -> dict[str, Tensor]:
        """Return the vector observations of a chunk on a device, without the environments that are not sampled."""
        found = {name: x for name, x in rows.get("obs").to_dict().items() if x.is_floating_point()}
        if self.columns is not None:
            found = {name: x.index_select(1, self.columns) for name, x in found.items()}
        return {name: x.to(device, non_blocking=True) for name, x in found.items()}

    def restore(self, num_rows: int) -> None:
        """Declare that the first `num_rows` ring rows were filled from a checkpoint. They must be whole chunks."""
        assert num_rows % self.ticks_per_chunk == 0 and num_rows <= self.layout.capacity, num_rows
        self.first, self.committed, self.promised, self.num_restored = 0, num_rows, num_rows, num_rows
        if num_rows > 0:
            self.row_bounds.learn(self.views[:num_rows])
        self._granted.clear()
        self._publish_bounds()

    def free(self) -> None:
        """Return the slab's memory to its device at once, even if other objects refer to it.

        The replay cannot be used afterwards.
        Raises: RuntimeError if the slab is a mapped file (`shared.handover.create_memfd_slab`).
        """
        self.slab.untyped_storage().resize_(0)
        if self.slab.is_cuda:
            torch.cuda.empty_cache()

    def _publish_bounds(self) -> None:
        """Write the bounds to the device, in the order of the stream and without a copy from the host."""
        self._bounds[0].fill_(self.first)  # the number is an argument of the kernel
        self._bounds[1].fill_(self.num_rows)


class _HostStaging:
    """Copies host samples to the GPU through pinned memory.

    A pinned buffer is overwritten only after its last copy has finished. The training loop is at most two steps ahead
    of the GPU, and with each step it may sample once more for a row of metrics, so with five buffers it never waits.
    """

    def __init__(self) -> None:
        self._slots: list[dict] = [{} for _ in range(5)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._slots)
        self._turn = 0

    def move(self, batch: dict, device: torch.device) -> dict:
        """Return the batch on the device. Does not wait for the copy."""
        self._turn = (self._turn + 1) % len(self._slots)
        slot, copied = self._slots[self._turn], self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()
        for key, value in batch.items():
            if key not in slot or slot[key].shape != value.shape:
                slot[key] = torch.empty_like(value, pin_memory=True)
            slot[key].copy_(value)
        moved = {key: slot[key].to(device, non_blocking=True) for key in batch}
        copied = self._copied[self._turn] = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        return moved
