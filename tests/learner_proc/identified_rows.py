"""A small replay that is filled with rows whose values identify them."""

from __future__ import annotations

import torch

from learner_proc.replay import Replay
from shared.stream import ObsSpec, StreamSpec, plan_layout

E, K, CAPACITY, LENGTH = 3, 4, 24, 6
SPEC = StreamSpec(E, {"policy": ObsSpec((2,), "float32")}, 1)
LOUD = 0xAB


def make_replay(capacity: int = CAPACITY, *, columns: list[int] | None = None) -> Replay:
    layout = plan_layout(SPEC, capacity)
    slab = torch.full((layout.num_bytes,), LOUD, dtype=torch.uint8)
    return Replay(slab, layout, ticks_per_chunk=K, seed=0, device=torch.device("cpu"), columns=columns)


def write(replay: Replay, row: int, first_tick: int) -> None:
    """Write K rows whose values identify them: every value is 1000 * environment + tick."""
    for k in range(K):
        value = 1000.0 * torch.arange(E) + first_tick + k
        replay.views["reward"][row + k] = value
        replay.views["obs", "policy"][row + k] = value[:, None]
        replay.views["action"][row + k] = value[:, None]
        for flag in ("is_first", "is_last", "is_terminal"):
            replay.views[flag][row + k] = False
        replay.views["policy_version"][row + k] = first_tick + k


def sampled_rows(replay: Replay) -> torch.Tensor:
    """Return the ring rows that can be sampled, oldest first."""
    return torch.arange(replay.first, replay.committed) % replay.layout.capacity


def fill(replay: Replay, chunks: int, start: int = 0) -> None:
    for chunk in range(start, start + chunks):
        row = replay.grant()
        write(replay, row, chunk * K)
        replay.commit(row)
