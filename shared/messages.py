"""The messages between collector and learner: small msgpack maps, every field typed and bounded.

    collector -> learner     Hello, SelfTest, Commit
    learner -> collector     Welcome, Grant, Refusal

Whatever does not decode to exactly one of these, within its bounds, raises MalformedMessage; the channel counts and drops it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import msgpack

PROTOCOL = 2
MAX_MESSAGE_BYTES = 64 * 1024
MAX_EPISODES = 2048  # finished episodes that one commit names; all are counted
_COUNT = 1 << 48


class MalformedMessage(ValueError):
    """Bytes that are no message of this protocol, or a value outside its bounds."""


def _int(maximum: int = _COUNT, minimum: int = 0) -> Any:
    return field(metadata={"kind": int, "minimum": minimum, "maximum": maximum})


def _bounded(kind: type, maximum: int) -> Any:
    return field(metadata={"kind": kind, "maximum": maximum})


@dataclass(frozen=True)
class Hello:
    """First words of a collector incarnation."""

    protocol: int = _int(1 << 16)
    run_id: str = _bounded(str, 64)
    incarnation: int = _int(1 << 32)
    pid: int = _int(1 << 32)
    spec: dict = _bounded(dict, 64)


@dataclass(frozen=True)
class Welcome:
    """The replay's handle. memfd: the descriptor travels with the message; cuda_ipc: `handle` and the GPU's `uuid`."""

    transport: str = _bounded(str, 16)
    num_bytes: int = _int()
    capacity: int = _int()
    uuid: str = _bounded(str, 64)
    handle: list = _bounded(list, 8)
    test_row: int = _int()
    random_frames: int = _int()
    agent_steps: int = _int()


@dataclass(frozen=True)
class SelfTest:
    """The collector wrote a pattern into the rows of one chunk at the welcome's `test_row`."""

    checksum: int = _int((1 << 63) - 1, -(1 << 63))
    num_bytes: int = _int()
    write_s: float = _bounded(float, 1 << 20)


@dataclass(frozen=True)
class Grant:
    """Permission to write K rows from ring row `row`; in lockstep only after adopting policy `version`."""

    seq: int = _int()
    row: int = _int()
    version: int = _int()


@dataclass(frozen=True)
class Commit:
    """A granted chunk is complete in the replay. Of the `num_episodes` that finished in it, the newest are named in packed
    arrays of equal count: float32 returns, int32 lengths in agent steps, uint8 kinds (see `EPISODE_KINDS`)."""

    seq: int = _int()
    row: int = _int()
    agent_steps: int = _int()
    env_frames: int = _int()
    policy_version: int = _int()
    checksum: int = _int((1 << 63) - 1, -(1 << 63))
    returns: bytes = _bounded(bytes, 4 * MAX_EPISODES)
    lengths: bytes = _bounded(bytes, 4 * MAX_EPISODES)
    kinds: bytes = _bounded(bytes, MAX_EPISODES)
    num_episodes: int = _int()
    num_diverged: int = _int()
    rss_bytes: int = _int()  # the collector's memory, see `shared.memory.Memory`
    gpu_bytes: int = _int()
    device_bytes: int = _int()


@dataclass(frozen=True)
class Refusal:
    """The learner will not work with this collector; the text says why."""

    reason: str = _bounded(str, 2048)


EPISODE_KINDS = ("train", "eval", "random")  # random: any of its actions was drawn before weights arrived
Message = Hello | Welcome | SelfTest | Grant | Commit | Refusal
_TYPES: dict[str, type] = {cls.__name__: cls for cls in (Hello, Welcome, SelfTest, Grant, Commit, Refusal)}


def encode(message: Message) -> bytes:
    """Raises: MalformedMessage if a value lies outside its bounds or the whole exceeds MAX_MESSAGE_BYTES."""
    values = asdict(message)
    _check(type(message), values)
    raw = _packed({"type": type(message).__name__, **values})
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{type(message).__name__} of {len(raw)} bytes; the bound is {MAX_MESSAGE_BYTES}")
    return raw


def decode(raw: bytes) -> Message:
    """Raises: MalformedMessage on anything but one well-formed, bounded message."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(raw)} bytes; the bound is {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(raw, strict_map_key=True)
    except Exception as error:  # msgpack raises many unrelated types; whatever it is, these bytes are no message
        raise MalformedMessage(f"not msgpack: {error!r:.100}") from error
    name = values.pop("type", None) if isinstance(values, dict) else None
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise MalformedMessage("no map with a known type")
    _check(cls, values)
    message = cls(**values)
    if isinstance(message, Commit):
        _check_episodes(message)
    return message


def _check_episodes(commit: Commit) -> None:
    count = len(commit.kinds)
    if not len(commit.returns) == len(commit.lengths) == 4 * count:
        raise MalformedMessage("a commit's episode arrays differ in count")
    if commit.num_episodes < count:
        raise MalformedMessage(f"a commit counts {commit.num_episodes} episodes and names {count}")


def _packed(values: dict) -> bytes:
    raw = msgpack.packb(values)
    assert raw is not None  # the stub allows None for a custom buffer
    return raw


def _check(cls: type, values: dict) -> None:
    expected = {entry.name: entry.metadata for entry in fields(cls)}
    if values.keys() != expected.keys():
        raise MalformedMessage(f"{cls.__name__} has fields {sorted(map(str, values))[:16]}, wanted {sorted(expected)}")
    for name, bounds in expected.items():
        value, kind = values[name], bounds["kind"]
        if type(value) is not kind:
            raise MalformedMessage(f"{cls.__name__}.{name} is {type(value).__name__}, wanted {kind.__name__}")
        size = value if kind in (int, float) else len(value)
        if not bounds.get("minimum", 0) <= size <= bounds["maximum"]:
            raise MalformedMessage(
                f"{cls.__name__}.{name} is {size}, wanted {bounds.get('minimum', 0)}..{bounds['maximum']}"
            )
