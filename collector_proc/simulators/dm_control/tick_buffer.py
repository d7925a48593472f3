"""One tick of every environment as numpy views of one block of memory, shared with the workers or private.

    | obs.policy [E, 17] f32 | action [E, A] f32 | reward [E] f32 | is_first, is_last, is_terminal | num_diverged i64 |
                               ^ written by the collector; all else by whoever steps environment e, in row e only

Whatever nobody overwrites keeps its last value: that is how a diverged environment repeats its last good observation.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import numpy as np

from shared.stream import ALIGNMENT, DTYPE_BYTES, StreamSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _blocks(spec: StreamSpec) -> list[tuple[str, tuple[int, ...], str]]:
    per_env = [(entry.name, entry.shape, entry.dtype) for entry in spec.fields() if entry.per_env]
    return [*per_env, ("num_diverged", (), "int64")]


def _size(spec: StreamSpec, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one block, rounded up so that the next one starts aligned."""
    count = spec.num_envs * math.prod(shape)
    return -(-count * DTYPE_BYTES[dtype] // ALIGNMENT) * ALIGNMENT


def tick_bytes(spec: StreamSpec) -> int:
    """Bytes a TickBuffer of this spec needs."""
    return sum(_size(spec, shape, dtype) for _, shape, dtype in _blocks(spec))


class TickBuffer:
    """Views of `memory`, tick_bytes(spec) long: action (E, A), obs[name] (E, *shape), reward and flags (E,)."""

    def __init__(self, spec: StreamSpec, memory: mmap.mmap) -> None:
        views: dict[str, NDArray] = {}
        offset = 0
        for name, shape, dtype in _blocks(spec):
            count = spec.num_envs * math.prod(shape)
            flat = np.frombuffer(memory, np.dtype(dtype), count, offset)
            views[name] = flat.reshape(spec.num_envs, *shape)
            offset += _size(spec, shape, dtype)
        self.obs = {name: views[f"obs.{name}"] for name in spec.obs}
        self.action, self.reward = views["action"], views["reward"]
        self.is_first, self.is_last, self.is_terminal = views["is_first"], views["is_last"], views["is_terminal"]
        self.num_diverged = views["num_diverged"]
