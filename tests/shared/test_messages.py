"""A message that is encoded is decoded unchanged, and all other bytes are refused."""

from dataclasses import fields
from typing import Any

import msgpack
import pytest

from shared.messages import (
    MAX_EPISODES,
    MAX_MESSAGE_BYTES,
    Commit,
    Grant,
    Hello,
    MalformedMessage,
    MappingFailed,
    NextRound,
    Refusal,
    SelfTest,
    Welcome,
    decode,
    encode,
)

COMMIT = Commit(
    seq=7,
    row=40,
    agent_steps=1000,
    env_frames=2000,
    policy_version=3,
    checksum=-5,
    returns=b"\0" * 8,
    lengths=b"\1\0\0\0" * 2,
    kinds=b"\0\1",
    versions=b"\0" * 8 + b"\3" + b"\0" * 7,
    num_episodes=5,
    rss_bytes=10**9,
)
EVERY = [
    Hello(1, "run", bytes(32), 0, 4242, {"num_envs": 8, "obs": {}, "action_dim": 2}),
    Welcome(bytes(32), "cuda_ipc", 1 << 21, 100, "GPU-1", [b"\1" * 66, 5, 0, b"x", 1, b"y", True], 0, 10_000, 0),
    MappingFailed("because"),
    SelfTest(-(1 << 40), 1 << 21, 0.25),
    Grant(1, 20, 3),
    NextRound(4),
    COMMIT,
    Refusal("because"),
]


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_an_encoded_message_is_decoded_unchanged(message):
    assert decode(encode(message)) == message


def test_the_largest_commit_fits_a_message():
    largest = {entry.name: entry.metadata["maximum"] for entry in fields(Commit)}
    episodes = {name: b"\1" * largest[name] for name in ("returns", "lengths", "kinds", "versions")}
    commit = Commit(**largest | episodes)
    assert len(commit.kinds) == MAX_EPISODES and len(encode(commit)) <= MAX_MESSAGE_BYTES


def test_a_commit_without_episodes_or_memory_needs_only_its_first_five_fields():
    assert decode(encode(Commit(7, 40, 1000, 2000, 3))) == Commit(7, 40, 1000, 2000, 3)


def pack(value: Any) -> bytes:
    raw = msgpack.packb(value)
    assert raw is not None
    return raw


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HELLO = [entry.name for entry in fields(Hello)]
GRANT = {"type": "Grant", "seq": 1, "row": 20, "version": 0}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        pack([1, 2]),
        pack(GRANT)[:-1],
        pack(GRANT | {"type": "Pickle"}),
        pack(GRANT | {"row": -1}),
        pack(GRANT | {"row": 1 << 60}),
        pack(GRANT | {"row": "20"}),
        pack(GRANT | {"row": True}),
        pack(GRANT | {"extra": 1}),
        pack({"type": "Grant", "seq": 1}),
        pack({"type": ["Grant"]}),
        pack({"type": nested(400)}),
        pack({"type": "Hello", **{name: getattr(EVERY[0], name) for name in HELLO}, "spec": {"obs": nested(400)}}),
        pack({"type": "Hello", **{name: getattr(EVERY[0], name) for name in HELLO}, "spec": {"a": nested(4)}}),
        pack({"type": "Hello", **{name: getattr(EVERY[0], name) for name in HELLO}, "secret": b"short"}),
        b"\x81" * 1000 + b"\xc0",
        b"\x91" * 60_000 + b"\xc0",
        pack({"type": "Refusal", "reason": "x" * 3000}),
        b"\0" * (MAX_MESSAGE_BYTES + 1),
    ],
)
def test_bytes_that_are_not_a_message_within_its_bounds_are_refused(raw):
    with pytest.raises(MalformedMessage):
        decode(raw)


def test_a_commit_with_episode_arrays_of_different_lengths_is_refused():
    values = {name: getattr(COMMIT, name) for name in COMMIT.__dataclass_fields__}
    raw = pack({"type": "Commit", **values, "kinds": b"\0"})
    with pytest.raises(MalformedMessage, match="8 bytes of returns, 8 of lengths, 1 of kinds and 16 of versions"):
        decode(raw)


def test_a_commit_that_describes_more_episodes_than_it_counts_is_refused():
    values = {name: getattr(COMMIT, name) for name in COMMIT.__dataclass_fields__}
    with pytest.raises(MalformedMessage, match="describes 2 episodes and counts 1"):
        decode(pack({"type": "Commit", **values, "num_episodes": 1}))


def test_damaged_bytes_raise_no_other_error_than_malformed_message():
    import random

    source = random.Random(0)
    base = bytearray(encode(COMMIT))
    for _ in range(5000):
        raw = bytearray(base)
        for _ in range(source.randint(1, 6)):
            raw[source.randrange(len(raw))] = source.randrange(256)
        try:
            decode(bytes(raw[: source.randint(0, len(raw))]))
        except MalformedMessage:
            continue


def test_a_commit_with_an_episode_of_an_unknown_kind_is_malformed():
    packed = encode(
        Commit(1, 0, 8, 8, 1, returns=bytes(4), lengths=bytes(4), kinds=bytes([9]), versions=bytes(8), num_episodes=1)
    )
    with pytest.raises(MalformedMessage, match="kind 9; expected a number below 4"):
        decode(packed)
