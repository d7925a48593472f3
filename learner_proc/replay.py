"""The replay ring and its sampler.

Rows are counted from the start of the run and never wrap; ring row = row % T_cap. With T_cap = 8 and chunks of K = 2:

    row        0  1  2  3  4  5  6  7  8  9          ring rows 0 1 hold rows 8 9 once they are granted
                     |<- sampled  ->|<- granted->|
                    first         committed    promised

`grant()` moves `promised` on and pushes `first` out of the way before anybody writes; `commit()` moves `committed` on.
`revoke()` gives the rows of a dead collector back: they were never in the sampler's reach.
"""

from __future__ import annotations

from collections import deque

import torch
from tensordict import TensorDict
from torch import Tensor

from shared.stream import Layout, ring_views


class Replay:
    """T_cap rows of E environments in one slab, sampled as fixed windows of consecutive rows.

    slab: uint8 (layout.num_bytes,), on the train device or in (pinned) host memory. Samples arrive on `device`.
    """

    def __init__(self, slab: Tensor, layout: Layout, *, ticks_per_chunk: int, seed: int, device: torch.device) -> None:
        assert layout.capacity % ticks_per_chunk == 0, (layout.capacity, ticks_per_chunk)
        self.slab, self.layout, self.ticks_per_chunk, self.device = slab, layout, ticks_per_chunk, device
        self.views = ring_views(slab, layout)
        self.generator = torch.Generator(slab.device).manual_seed(seed)
        self.first = self.committed = self.promised = 0
        self._granted: deque[int] = deque()
        self._bounds = torch.zeros(2, dtype=torch.int64, device=slab.device)  # first row, sampled rows
        self._flat: dict[tuple[str, ...], Tensor] = {
            entry.key: self.views.get(entry.key).flatten(0, 1 if entry.per_env else 0) for entry in layout.fields
        }
        self._per_env = {entry.key: entry.per_env for entry in layout.fields}
        self._staging = _HostStaging() if slab.device.type != device.type else None

    @property
    def num_rows(self) -> int:
        """Committed rows in the sampler's reach (of each environment)."""
        return self.committed - self.first

    @property
    def num_granted(self) -> int:
        return len(self._granted)

    def grant(self) -> int:
        """Take the next K rows out of the sampler's reach and return their first ring row.

        On a GPU the caller sends the grant only once this point of the stream has been passed.
        """
        row = self.promised
        self.promised += self.ticks_per_chunk
        self.first = max(self.first, self.promised - self.layout.capacity)
        self._granted.append(row)
        self._publish_bounds()
        return row % self.layout.capacity

    def commit(self, row: int) -> TensorDict:
        """Put the oldest granted chunk into the sampler's reach; returns views of its K rows.

        Raises: ValueError if `row` is not the oldest grant's ring row.
        """
        expected = self._granted[0] % self.layout.capacity if self._granted else None
        if row != expected:
            raise ValueError(f"commit of ring row {row}, wanted the oldest grant, {expected}")
        self.committed = self._granted.popleft() + self.ticks_per_chunk
        self._publish_bounds()
        return self.chunk(row)

    def revoke(self) -> None:
        """Forget every grant; their rows will be granted again."""
        self._granted.clear()
        self.promised = self.committed

    def chunk(self, row: int) -> TensorDict:
        """Views of the K rows from ring row `row`."""
        return self.views[row : row + self.ticks_per_chunk]

    def sample(self, num_sequences: int, length: int, *, generator: torch.Generator | None = None) -> TensorDict:
        """Windows drawn uniformly over (environment, start), newest row included, never across the write head.

        Returns: TensorDict [B, L] of every field; `policy_version` (B, L). No host synchronisation. generator: another than
        the one training draws by.
        """
        assert self.num_rows >= length, (self.num_rows, length)
        return self.draw(num_sequences, length, generator=generator)

    def draw(self, num_sequences: int, length: int, *, generator: torch.Generator | None = None) -> TensorDict:
        """`sample` by the bounds on the device alone, as a graph captures it; with too few rows it draws nonsense."""
        device, generator = self.slab.device, generator or self.generator
        first, num_rows = self._bounds[0], self._bounds[1]
        # float rand is biased beyond 2^24 rows and randint takes no tensor bound; 2^62 leaves a bias below 1e-9
        start = torch.randint(0, 2**62, (num_sequences, 1), device=device, generator=generator)
        start = start % (num_rows - length + 1)
        env = torch.randint(0, self.layout.num_envs, (num_sequences, 1), device=device, generator=generator)
        rows = (first + start + torch.arange(length, device=device)) % self.layout.capacity  # (B, L)
        index = {True: (rows * self.layout.num_envs + env).view(-1), False: rows.view(-1)}
        batch = {key: flat.index_select(0, index[self._per_env[key]]) for key, flat in self._flat.items()}
        if self._staging is not None:
            batch = self._staging.move(batch, self.device)
        shaped = {key: value.view(num_sequences, length, *value.shape[1:]) for key, value in batch.items()}
        obs = {key[1]: value for key, value in shaped.items() if len(key) == 2}
        rest = {key[0]: value for key, value in shaped.items() if len(key) == 1}
        return TensorDict({"obs": TensorDict(obs, [num_sequences, length]), **rest}, [num_sequences, length])

    def restore(self, num_rows: int) -> None:
        """Declare that ring rows 0..num_rows were filled from a checkpoint; a whole number of chunks."""
        assert num_rows % self.ticks_per_chunk == 0 and num_rows <= self.layout.capacity, num_rows
        self.first, self.committed, self.promised = 0, num_rows, num_rows
        self._granted.clear()
        self._publish_bounds()

    def _publish_bounds(self) -> None:
        self._bounds[0].fill_(self.first)  # scalar arguments of kernels: ordered on the stream, no host copy
        self._bounds[1].fill_(self.num_rows)


class _HostStaging:
    """Pinned copies of host samples on their way to the GPU.

    The host runs at most two steps ahead, and each may have a row of metrics beside it, so five suffice.
    """

    def __init__(self) -> None:
        self._slots: list[dict] = [{} for _ in range(5)]
        self._turn = 0

    def move(self, batch: dict, device: torch.device) -> dict:
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        for key, value in batch.items():
            if key not in slot or slot[key].shape != value.shape:
                slot[key] = torch.empty_like(value, pin_memory=True)
            slot[key].copy_(value)
        return {key: pinned.to(device, non_blocking=True) for key, pinned in slot.items()}
