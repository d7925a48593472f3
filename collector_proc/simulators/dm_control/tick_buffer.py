"""One tick of every environment, as numpy views of one block of memory. Workers share the memory with the collector.

    | obs.policy [E, 17] f32 | action [E, A] f32 | reward [E] f32 | is_first, is_last, is_terminal | num_diverged i64 |

The collector writes the actions. The process that steps environment e writes everything else, in row e only. An entry
that is not written keeps its last value, so an environment that diverged repeats its last finite observation.
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
    """Return the name, the shape of one environment's part, and the dtype of every block, in their order in memory."""
    per_env = [(entry.name, entry.shape, entry.dtype) for entry in spec.fields() if entry.per_env]
    return [*per_env, ("num_diverged", (), "int64")]


def _size(spec: StreamSpec, shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of one block, rounded up so that the next block is aligned."""
    count = spec.num_envs * math.prod(shape)
    return -(-count * DTYPE_BYTES[dtype] // ALIGNMENT) * ALIGNMENT


def tick_bytes(spec: StreamSpec) -> int:
    """Return the bytes that a TickBuffer of this spec needs."""
    return sum(_size(spec, shape, dtype) for _, shape, dtype in _blocks(spec))


class TickBuffer:
    """Views of `memory`, which has tick_bytes(spec) bytes.

    Shapes: action (E, A), obs[name] (E, *shape), reward, flags and num_diverged (E,).
    """

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
