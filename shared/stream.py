"""The layout of rows that both processes use: fields, shapes, dtypes, and the place of each field in the replay's slab.

The replay is a time-major ring of `capacity` rows for each of E environments. Each field has one contiguous block:

    slab (uint8)   | obs.policy [T_cap, E, 48] f32 | action [T_cap, E, 12] f32 | reward [T_cap, E] f32 | is_first ... |
                     ^ 256-byte aligned              ^                           ^

A chunk of K ticks is K consecutive rows of every block, so it is written with one contiguous copy per field. Row t
holds an arrival: the observation, the action that led to it (exactly as executed; 0 at `is_first`), the reward of that
action, and the flags. Example: T_cap = 4, E = 2, and an episode of environment 0 that ends at row 1:

    row        0        1        2        3
    is_first   1        0        1        0       row 2 is the reset: action 0, reward 0
    is_last    0        1        0        0       `is_terminal` is set too, unless the episode ended by a time-out
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

ALIGNMENT = 256
# torch's CUDA allocator places requests below 10 MiB in shared segments of 20 MiB. A larger request has a segment for
# itself. An IPC handle exports a whole segment, so the slab must have one for itself.
SLAB_UNIT = 2 * 1024 * 1024
SLAB_MINIMUM = 20 * 1024 * 1024
MAX_OBS = 256  # observation entries
MAX_DIMS = 8  # dimensions of an entry
MAX_ROW_VALUES = 1 << 32  # values in one row of all environments; no simulator has more
DTYPE_BYTES = {"float32": 4, "int64": 8, "uint8": 1, "bool": 1}


def evaluation_columns(num_envs: int, num_evaluating: int) -> list[int]:
    """Return the indices of the environments that evaluate, spread evenly over all of them.

    Simulators give neighbouring environments the same variant of a task, such as a type of terrain. A block of
    evaluation environments would see one variant only, and training would lack it. Example: 2 of 8 are the indices 3
    and 7.
    """
    return [(k + 1) * num_envs // num_evaluating - 1 for k in range(num_evaluating)]


@dataclass(frozen=True)
class Field:
    """One field of a row. `shape` is without the time axis and, if `per_env`, without the axis of environments."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    per_env: bool = True

    @property
    def key(self) -> tuple[str, ...]:
        """Return its key in a TensorDict, such as ("obs", "policy") or ("reward",)."""
        return tuple(self.name.split("."))


@dataclass(frozen=True)
class ObsSpec:
    """One observation entry: an image, uint8 (height, width, channels), or a vector, float32 (size,)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_image(self) -> bool:
        """Return whether the entry is an image."""
        return self.dtype == "uint8"


@dataclass(frozen=True)
class StreamSpec:
    """What a simulator streams: E environments, named observations and A continuous actions in [-1, 1]."""

    num_envs: int
    obs: dict[str, ObsSpec]
    action_dim: int

    def fields(self) -> list[Field]:
        """Return every field of a row, in the order of their blocks in the slab."""
        obs = [Field(f"obs.{name}", spec.shape, spec.dtype) for name, spec in sorted(self.obs.items())]
        return obs + [
            Field("action", (self.action_dim,), "float32"),
            Field("reward", (), "float32"),
            Field("is_first", (), "bool"),
            Field("is_last", (), "bool"),
            Field("is_terminal", (), "bool"),
            Field("policy_version", (), "int64", per_env=False),
        ]

    def to_dict(self) -> dict:
        """Return the spec as plain values for a message or a checkpoint."""
        obs = {name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in sorted(self.obs.items())}
        return {"num_envs": self.num_envs, "obs": obs, "action_dim": self.action_dim}

    @staticmethod
    def from_dict(raw: dict) -> StreamSpec:
        """Return the spec that `to_dict` gave. Raises: ValueError if it is malformed or out of bounds."""
        try:
            obs = {name: ObsSpec(tuple(entry["shape"]), entry["dtype"]) for name, entry in raw["obs"].items()}
            spec = StreamSpec(raw["num_envs"], obs, raw["action_dim"])
            _check_types(spec)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"malformed stream spec {raw!r:.200}: {error!r:.200}; expected num_envs, action_dim, and obs with a "
                "shape and a dtype for each entry"
            ) from error
        sizes = [spec.num_envs, spec.action_dim, *(n for o in obs.values() for n in o.shape)]
        row_values = spec.num_envs * (spec.action_dim + sum(math.prod(o.shape) for o in obs.values()))
        if (
            not obs
            or any(n < 1 or n > 1 << 24 for n in sizes)
            or row_values > MAX_ROW_VALUES
            or any(o.dtype not in ("uint8", "float32") for o in obs.values())
        ):
            raise ValueError(
                f"stream spec out of bounds: {raw!r:.200}; expected at least one observation, sizes from 1 to 2^24, at "
                f"most {MAX_ROW_VALUES} values in a row, and uint8 or float32 entries"
            )
        return spec

    def digest(self) -> str:
        """Return a short hash by which two specs are compared."""
        return hashlib.sha256(repr(self.to_dict()).encode()).hexdigest()[:16]


def _check_types(spec: StreamSpec) -> None:
    """Check names and types of a spec that another process sent. Raises: TypeError."""
    if not 1 <= len(spec.obs) <= MAX_OBS:
        raise TypeError(f"{len(spec.obs)} observation entries, expected 1 to {MAX_OBS}")
    for name, entry in spec.obs.items():
        # A dot would be read as one more level of the TensorDict, and the names are shown in a terminal.
        if not isinstance(name, str) or not name.isprintable() or "." in name or not 0 < len(name) <= 200:
            raise TypeError(f"an entry has the name {name!r:.50}, expected 1 to 200 printable characters without a dot")
        if type(entry.dtype) is not str or len(entry.shape) > MAX_DIMS:
            raise TypeError(f"{name!r} has the dtype {entry.dtype!r:.20} and {len(entry.shape)} dimensions")
    sizes = [spec.num_envs, spec.action_dim, *(n for entry in spec.obs.values() for n in entry.shape)]
    if any(type(size) is not int for size in sizes):
        raise TypeError("a size that is not an integer")


@dataclass(frozen=True)
class Layout:
    """The place of every field's block in the slab, as a byte offset."""

    capacity: int
    num_envs: int
    fields: tuple[Field, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def shape(self, entry: Field) -> tuple[int, ...]:
        """Return the shape of a field's block, with the axes of time and of environments."""
        lead = (self.capacity, self.num_envs) if entry.per_env else (self.capacity,)
        return (*lead, *entry.shape)


def plan_layout(spec: StreamSpec, capacity: int) -> Layout:
    """Return the layout of a ring of `capacity` rows: the aligned blocks of the fields, one after the other.

    The size of the slab is such that torch's CUDA allocator gives it a segment of its own.
    """
    fields, offsets, end = tuple(spec.fields()), [], 0
    for entry in fields:
        offsets.append(end)
        count = capacity * (spec.num_envs if entry.per_env else 1) * math.prod(entry.shape)
        end += -(-count * DTYPE_BYTES[entry.dtype] // ALIGNMENT) * ALIGNMENT
    return Layout(capacity, spec.num_envs, fields, tuple(offsets), max(SLAB_MINIMUM, -(-end // SLAB_UNIT) * SLAB_UNIT))


def ring_views(slab: Tensor, layout: Layout) -> TensorDict:
    """Return the fields of a slab as a TensorDict of views of batch size [T_cap]. Observations are nested under "obs".

    Raises: ValueError if the slab is not a uint8 vector of the layout's size.
    """
    import torch
    from tensordict import TensorDict

    if slab.dtype != torch.uint8 or slab.shape != (layout.num_bytes,):
        raise ValueError(f"the slab is {slab.dtype} {tuple(slab.shape)}; expected uint8 ({layout.num_bytes},)")
    views = TensorDict({}, batch_size=[layout.capacity], device=slab.device)
    for entry, offset in zip(layout.fields, layout.offsets, strict=True):
        shape, dtype = layout.shape(entry), getattr(torch, entry.dtype)
        num_bytes = math.prod(shape) * DTYPE_BYTES[entry.dtype]
        views[entry.key] = slab[offset : offset + num_bytes].view(dtype).view(shape)
    return views
