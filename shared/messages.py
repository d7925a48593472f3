"""The messages between collector and learner: small msgpack maps, every field typed and bounded.

    collector -> learner     Hello, MappingFailed, SelfTest, Commit
    learner -> collector     Welcome, Grant, NextRound, Refusal

Bytes that are not exactly one of these messages, with every value within its bounds, raise MalformedMessage. The
channel (`shared.handover.Channel`) counts and drops them.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import msgpack

from shared.socket_folder import SECRET_BYTES

PROTOCOL = 5
MAX_MESSAGE_BYTES = 64 * 1024
MAX_REASON_CHARS = 2048
MAX_EPISODES = 2048  # finished episodes that one commit describes; it counts all of them
MAX_DEPTH = 4  # of lists and maps inside each other: a stream has shapes in entries in a map of observations
_COUNT = 1 << 48  # the largest count that a message may hold


class MalformedMessage(ValueError):
    """Bytes that are not a message of this protocol, or a message with a value outside its bounds."""


def _int(maximum: int = _COUNT, minimum: int = 0, default: Any = MISSING) -> Any:
    """Return the dataclass field of an integer within bounds."""
    return field(default=default, metadata={"kind": int, "minimum": minimum, "maximum": maximum})


def _bounded(kind: type, maximum: int, default: Any = MISSING, minimum: int = 0) -> Any:
    """Return the dataclass field of a float within bounds, or of a text, bytes, list or dict of a bounded length."""
    return field(default=default, metadata={"kind": kind, "minimum": minimum, "maximum": maximum})


def _secret() -> Any:
    """Return the dataclass field of the run's secret (`shared.socket_folder`). It is never shown."""
    metadata = {"kind": bytes, "minimum": SECRET_BYTES, "maximum": SECRET_BYTES}
    return field(repr=False, metadata=metadata)


@dataclass(frozen=True)
class Hello:
    """The first message of each collector process."""

    protocol: int = _int(1 << 16)
    run_id: str = _bounded(str, 64)
    secret: bytes = _secret()
    incarnation: int = _int(1 << 32)
    pid: int = _int(1 << 32)
    spec: dict = _bounded(dict, 64)


@dataclass(frozen=True)
class Welcome:
    """The answer to Hello: how to map the memory of the replay, and what the collector has to know of the run so far.

    If that memory turns out to be unusable, a second Welcome offers memory of another kind.

    transport "memfd": a file descriptor travels with the message. transport "cuda_ipc": `handle` is the CUDA IPC handle
    and `uuid` names the GPU.
    """

    secret: bytes = _secret()
    transport: str = _bounded(str, 16)
    num_bytes: int = _int()
    capacity: int = _int()
    uuid: str = _bounded(str, 64)
    handle: list = _bounded(list, 8)
    test_row: int = _int()  # where the self-test writes
    random_frames: int = _int()  # agent steps with random actions that the prefill still needs
    agent_steps: int = _int()  # of the whole run so far
    nonce: int = _int(1 << 32, default=0)  # selects the pattern of the self-test
    round_number: int = _int(default=0)  # of the round of lockstep that is due, see `learner_proc.rounds`


@dataclass(frozen=True)
class MappingFailed:
    """The collector cannot write into the memory of the Welcome, and waits for another offer.

    It has unmapped that memory, unless one of its copies may still run.
    """

    reason: str = _bounded(str, MAX_REASON_CHARS)


@dataclass(frozen=True)
class SelfTest:
    """The collector has written a test pattern into one chunk, which starts at the row `test_row` of the Welcome."""

    checksum: int = _int((1 << 63) - 1, -(1 << 63))
    num_bytes: int = _int()
    write_s: float = _bounded(float, 1 << 20)


@dataclass(frozen=True)
class Grant:
    """Permission to write one chunk, K rows from row `row` of the ring on.

    In lockstep the collector first adopts the weights of `version`.
    """

    seq: int = _int()
    row: int = _int()
    version: int = _int()


@dataclass(frozen=True)
class NextRound:
    """Another round of lockstep begins. The collector answers by connecting again, as a new one would."""

    number: int = _int()


@dataclass(frozen=True)
class Commit:
    """A granted chunk is complete in the replay.

    `num_episodes` episodes finished in it. Four packed arrays of equal length describe the newest of them, at most
    MAX_EPISODES, oldest first: float32 returns, int32 lengths in agent steps, uint8 indices into EPISODE_KINDS, and
    int64 policy versions: the one that is evaluated, or 0 if the episode belongs to no evaluation.
    """

    seq: int = _int()
    row: int = _int()
    agent_steps: int = _int()  # in this chunk
    env_frames: int = _int()  # in this chunk
    policy_version: int = _int()
    checksum: int = _int((1 << 63) - 1, -(1 << 63), default=0)
    returns: bytes = _bounded(bytes, 4 * MAX_EPISODES, default=b"")
    lengths: bytes = _bounded(bytes, 4 * MAX_EPISODES, default=b"")
    kinds: bytes = _bounded(bytes, MAX_EPISODES, default=b"")
    versions: bytes = _bounded(bytes, 8 * MAX_EPISODES, default=b"")
    num_episodes: int = _int(default=0)
    num_diverged: int = _int(default=0)
    eval_steps: int = _int(default=0)  # agent steps of evaluation environments in this chunk
    rss_bytes: int = _int(default=0)  # these three: the collector's memory, see `shared.memory.Memory`
    gpu_bytes: int = _int(default=0)
    device_bytes: int = _int(default=0)


@dataclass(frozen=True)
class Refusal:
    """The learner cannot work with this collector, for a reason that is shown to the user."""

    reason: str = _bounded(str, MAX_REASON_CHARS)


# random: at least one action was chosen before weights arrived; waiting: of an evaluation environment, but of no
# evaluation
EPISODE_KINDS = ("train", "eval", "random", "waiting")
Message = Hello | Welcome | MappingFailed | SelfTest | Grant | NextRound | Commit | Refusal
_TYPES: dict[str, type] = {
    cls.__name__: cls for cls in (Hello, Welcome, MappingFailed, SelfTest, Grant, NextRound, Commit, Refusal)
}


def encode(message: Message) -> bytes:
    """Return a message as bytes. Raises: MalformedMessage if a value or the whole message exceeds its bounds."""
    values = asdict(message)
    _check(type(message), values)
    raw = _packed({"type": type(message).__name__, **values})
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a {type(message).__name__} has {len(raw)} bytes; expected at most {MAX_MESSAGE_BYTES}")
    return raw


def decode(raw: bytes) -> Message:
    """Return the message in these bytes. Raises: MalformedMessage if they are not one message within its bounds."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a message has {len(raw)} bytes; expected at most {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(raw, strict_map_key=True)
    except Exception as error:  # msgpack raises errors of many unrelated types
        raise MalformedMessage(f"a message cannot be decoded: {error!r:.100}; expected msgpack") from error
    name = values.pop("type", None) if isinstance(values, dict) else None
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        shown = repr(name[:50]) if isinstance(name, str) else f"of {type(name).__name__}"  # repr of it may not end
        raise MalformedMessage(f"a message has the type {shown}; expected one of {', '.join(_TYPES)}")
    _check(cls, values)
    message = cls(**values)
    if isinstance(message, Commit):
        _check_episodes(message)
    return message


def _check_episodes(commit: Commit) -> None:
    """Check that the episode arrays have one length. Raises: MalformedMessage."""
    count = len(commit.kinds)
    if not 2 * len(commit.returns) == 2 * len(commit.lengths) == len(commit.versions) == 8 * count:
        raise MalformedMessage(
            f"a commit has {len(commit.returns)} bytes of returns, {len(commit.lengths)} of lengths, {count} of kinds "
            f"and {len(commit.versions)} of versions; expected 4, 4, 1 and 8 bytes for each episode"
        )
    if max(commit.kinds, default=0) >= len(EPISODE_KINDS):
        raise MalformedMessage(
            f"a commit has an episode of kind {max(commit.kinds)}; expected a number below {len(EPISODE_KINDS)}"
        )
    if commit.num_episodes < count:
        raise MalformedMessage(
            f"a commit describes {count} episodes and counts {commit.num_episodes}; expected it to count at least those"
        )


def _packed(values: dict) -> bytes:
    raw = msgpack.packb(values, unicode_errors="replace")  # a reason may name a file whose name is not valid text
    assert raw is not None  # None is possible for packers with a buffer of their own
    return raw


def _check(cls: type, values: dict) -> None:
    """Check that the values are those of a message type, each within its bounds. Raises: MalformedMessage."""
    expected = {entry.name: entry.metadata for entry in fields(cls)}
    if values.keys() != expected.keys():
        raise MalformedMessage(
            f"a {cls.__name__} has the fields {sorted(map(str, values))[:16]}; expected {sorted(expected)}"
        )
    for name, bounds in expected.items():
        value, kind = values[name], bounds["kind"]
        if type(value) is not kind:
            raise MalformedMessage(f"{cls.__name__}.{name} is of type {type(value).__name__}; expected {kind.__name__}")
        size = value if kind in (int, float) else len(value)
        lowest, highest = bounds.get("minimum", 0), bounds["maximum"]
        if not lowest <= size <= highest:
            what = "is" if kind in (int, float) else "has the length"
            raise MalformedMessage(f"{cls.__name__}.{name} {what} {size}; expected {lowest} to {highest}")
        if kind in (list, dict) and not _is_flat(value, MAX_DEPTH):
            raise MalformedMessage(f"{cls.__name__}.{name} is nested deeper than {MAX_DEPTH} levels; expected less")


def _is_flat(value: Any, depth: int) -> bool:
    """Return whether lists and maps are nested at most `depth` levels deep."""
    if not isinstance(value, list | dict):
        return True
    return depth > 0 and all(
        _is_flat(part, depth - 1) for part in (value.values() if isinstance(value, dict) else value)
    )
