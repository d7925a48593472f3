"""Both endpoints under mutated and under well-formed but wrong messages: nothing that they hold harms the run."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from collector_proc.weights_receiver import WeightsReceiver
from learner_proc.handshake import Handshake
from learner_proc.link import CollectorLink
from learner_proc.publisher import Publisher
from learner_proc.startup import allocate_replay
from shared.compose import compose
from shared.geometry import Geometry
from shared.logs import configure
from shared.memory import own_rss_bytes
from shared.messages import (
    PROTOCOL,
    Commit,
    Grant,
    Hello,
    MappingFailed,
    Message,
    Refusal,
    SelfTest,
    Welcome,
    encode,
)
from shared.socket_folder import SECRET_BYTES, WEIGHTS_SOCKET, obtain_secret
from shared.weights import acting_tensors, flat_bytes, manifest_of, pack_header
from tests.fakes.scripted_collector import SPEC, ScriptedCollector
from tests.processes import DEADLINE_S

MUTATED = 100_000
ROUND = 500  # messages between two good ones
FEW = [
    "env.num_envs=2",
    "collector.eval_envs=1",
    "collector.frames_per_batch=16",
    "collector.init_random_frames=32",
    "replay_buffer.buffer_size=256",
    "replay_buffer.batch_size=32",
    "replay_buffer.batch_length=8",
]
FAR = 1_000_000  # the number of a grant that is never given
STRANGE = bytes(SECRET_BYTES)
REUSED = [HealthCheck.function_scoped_fixture]  # all examples attack the same learner, as they would in a run


class Learner:
    """The learner's end of the socket, with one collector that streams and is always granted the next chunk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secret = folder, obtain_secret(folder)
        (folder / "logs").mkdir()
        log, chosen = configure(folder, "learner"), compose("quickstart", FEW)
        handshake = Handshake(
            run_id="run",
            secret=self.secret,
            num_envs=2,
            allocate=lambda spec, _: allocate_replay(spec, chosen, Geometry.of(chosen), device=torch.device("cpu")),
            random_frames=lambda: 32,
            agent_steps=lambda: 0,
            gpu_storage=None,
            log=log,
        )
        self.link = CollectorLink(folder, handshake, check_sums=False, log=log, newest_version=lambda: 5)
        self.join()

    def join(self) -> None:
        self.collector = ScriptedCollector(self.folder)
        self.collector.send_hello()
        for _ in range(3):
            self.link.poll()
        self.collector.receive_welcome()
        self.collector.send_self_test()
        self.link.poll()
        self.grant = self.collector.receive_grant()

    def drain(self, num_sent: int) -> None:
        """Poll until every message that was sent was dropped; none of them may commit a chunk."""
        for _ in range(num_sent):
            assert self.link.poll() == []
            if self.link.num_dropped == num_sent:
                return
        raise AssertionError((self.link.num_dropped, num_sent))

    def commit_one(self) -> None:
        """Let the collector commit its chunk, and check that it becomes part of the replay."""
        self.collector.commit(self.grant)
        (chunk,) = self.link.poll()
        assert chunk.commit.seq == self.grant.seq
        assert self.link.streaming is not None, "the collector was not lost"
        self.link.streaming.grant()
        self.grant = self.collector.receive_grant()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    made = Learner(tmp_path)
    yield made
    made.link.close()


def every_message(secret: bytes) -> list[bytes]:
    """Return one valid message of every type. None of them commits a chunk that was granted."""
    episodes = {"returns": bytes(8), "lengths": bytes(8), "kinds": bytes(2), "versions": bytes(16), "num_episodes": 2}
    commit = Commit(FAR, FAR, 16, 32, 1, 5, rss_bytes=1 << 30, gpu_bytes=1, **episodes)
    messages: list[Message] = [
        Hello(PROTOCOL, "run", secret, 0, 1, SPEC.to_dict()),
        Welcome(secret, "memfd", 1 << 21, 128, "GPU-1", [b"x" * 66, 5, True], 0, 1, 1, 7),
        MappingFailed("because"),
        SelfTest(5, 1 << 20, 0.5),
        Grant(FAR, 0, 3),
        commit,
        Refusal("because"),
    ]
    return [encode(message) for message in messages]


def mutate(raw: bytes, source: random.Random) -> bytes:
    """Return bytes in which a few were changed, cut, repeated or inserted."""
    changed = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        place, kind = source.randrange(len(changed) + 1), source.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << source.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = source.choice((0x80, 0x90, 0xC0, 0xC1, 0xCF, 0xDB, 0xDD, 0xDF, 0xFF))
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            changed[place:place] = changed[place : place + source.randint(1, 40)] * source.randint(1, 3)
        else:
            changed[place:place] = source.randbytes(source.randint(1, 8))
    return bytes(changed) or b"\xc1"


def check_flat(measure: Callable[[], None], *, rounds: int) -> None:
    """Call a function often; memory and descriptors after half of the rounds are those at the end."""
    middle = (0, 0)
    for number in range(rounds):
        measure()
        if number == rounds // 2:
            middle = (own_rss_bytes(), len(os.listdir("/proc/self/fd")))
    assert len(os.listdir("/proc/self/fd")) == middle[1]
    assert own_rss_bytes() < middle[0] + 4 * 2**20


def raw_end(collector: ScriptedCollector) -> socket.socket:
    """Return the collector's end of the connection, for bytes that a Channel does not send."""
    return socket.socket(fileno=os.dup(collector.channel.fileno()))


def test_mutated_messages_of_a_collector_do_no_harm(learner: Learner) -> None:
    source, base, sent = random.Random(1), every_message(learner.secret), 0
    end, null = raw_end(learner.collector), os.open(os.devnull, os.O_RDONLY)

    def attack() -> None:
        nonlocal sent
        for _ in range(ROUND // 20):
            for _ in range(20):
                descriptors = [null] * source.randint(1, 3) if source.random() < 0.02 else []
                socket.send_fds(end, [mutate(source.choice(base), source)], descriptors)
            sent += 20
            learner.drain(sent)
        learner.commit_one()

    check_flat(attack, rounds=MUTATED // ROUND)
    log = (learner.folder / "logs" / "learner.jsonl").read_text()
    assert len(log.splitlines()) < 100, "the rate of the log is limited"
    end.close()
    os.close(null)


def test_mutated_hellos_of_strangers_do_no_harm(learner: Learner) -> None:
    learner.collector.channel.close()
    learner.link.poll()
    source, base = random.Random(2), every_message(STRANGE)

    def attack() -> None:
        for _ in range(20):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(str(learner.folder / "replay.sock"))
            for _ in range(source.randint(0, 10)):
                stranger.send(mutate(source.choice(base), source))
            if source.random() < 0.5:
                stranger.send(base[0])
            stranger.close()
            for _ in range(3):
                assert learner.link.poll() == []

    check_flat(attack, rounds=50)
    learner.join()
    learner.commit_one()


WRONG_SPECS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=20,
)
NAMES = [entry.name for entry in fields(Commit) if entry.metadata["kind"] is int and entry.name != "checksum"]


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=REUSED)
@given(data=st.data())
def test_well_formed_messages_with_wrong_content_do_no_harm(learner: Learner, data: st.DataObject) -> None:
    before, grant = learner.link.num_dropped, learner.grant
    commit = Commit(grant.seq, grant.row, 16, 32, 1)
    bounds = {"seq": 1, "row": 1, "agent_steps": 17, "env_frames": 160_001, "policy_version": 6, "num_episodes": 17}
    name = data.draw(st.sampled_from([name for name in NAMES if name in bounds]))
    value = data.draw(st.integers(bounds[name], 1 << 48).filter(lambda value: value != getattr(grant, name, None)))
    learner.collector.channel.send(Commit(**(asdict(commit) | {name: value})))
    others = [Hello(PROTOCOL, "run", learner.secret, 0, 1, SPEC.to_dict()), SelfTest(1, 1, 1.0), Grant(1, 1, 1)]
    learner.collector.channel.send(data.draw(st.sampled_from(others)))
    learner.drain(before + 2)
    learner.commit_one()


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=REUSED)
@given(spec=st.dictionaries(st.sampled_from(["num_envs", "obs", "action_dim"]), WRONG_SPECS), known=st.booleans())
def test_a_hello_with_any_content_is_refused_or_dropped(learner: Learner, spec: dict, known: bool) -> None:
    learner.collector.channel.close()
    learner.link.poll()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(str(learner.folder / "replay.sock"))
    secret = learner.secret if known else STRANGE
    hello = {"protocol": PROTOCOL, "run_id": "run", "secret": secret, "incarnation": 0, "pid": 1, "spec": spec}
    packed = msgpack.packb({"type": "Hello", **hello}, unicode_errors="replace")
    assert packed is not None
    stranger.send(packed)
    for _ in range(4):
        assert learner.link.poll() == []
    assert learner.link.streaming is None
    stranger.close()
    learner.link.poll()
    learner.join()
    learner.commit_one()


class Collector:
    """The collector's end of the weights, with a policy of two layers."""

    def __init__(self, folder: Path) -> None:
        (folder / "logs").mkdir()
        configure(folder, "collector")
        self.secret, policy = obtain_secret(folder), nn.Linear(3, 2)
        self.weights, tensors = policy.weight, acting_tensors(policy)
        self.receiver = WeightsReceiver(policy, socket_dir=folder, run_id="run")
        self.manifest, self.num_bytes = manifest_of(tensors), flat_bytes(tensors.values())

    def header(self, **changes: Any) -> bytes:
        values = {"run_id": "run", "secret": self.secret, "manifest": self.manifest, "num_bytes": self.num_bytes}
        return pack_header(**(values | changes))

    def adopt(self, header: bytes) -> bool:
        """Let the receiver take a message with weights of ones."""
        return self.receiver.adopt_frame(memoryview(header + np.ones(self.num_bytes // 4, np.float32).tobytes()))


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(tmp_path)
    yield made
    made.receiver.close()


def test_mutated_messages_of_weights_do_no_harm(collector: Collector, tmp_path: Path) -> None:
    source, receiver, version = random.Random(3), collector.receiver, 0

    def attack() -> None:
        nonlocal version
        version += 1
        good, refused = collector.header(version=version), receiver.num_refused
        for _ in range(ROUND):
            changed = mutate(good, source)
            while changed == good:
                changed = mutate(good, source)
            assert not collector.adopt(changed)
        assert receiver.num_refused == refused + ROUND
        assert collector.adopt(good) and receiver.version == version and (collector.weights == 1).all()

    check_flat(attack, rounds=MUTATED // ROUND)
    log = (tmp_path / "logs" / "collector.jsonl").read_text()
    assert len(log.splitlines()) < 100, "the rate of the log is limited"


WRONG_HEADERS = st.one_of(
    st.fixed_dictionaries({"version": st.sampled_from([-(1 << 63), -1, 0, (1 << 48) + 1, (1 << 64) - 1])}),
    st.fixed_dictionaries({"secret": st.binary(min_size=1, max_size=40)}),
    st.fixed_dictionaries({"run_id": st.text(max_size=60).filter(lambda text: text != "run")}),
    st.fixed_dictionaries({"manifest": st.text(max_size=70)}),
    st.fixed_dictionaries({"num_bytes": st.integers(0, 1 << 60).filter(lambda size: size != 48)}),
)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=REUSED)
@given(wrong=WRONG_HEADERS)
def test_well_formed_weights_with_wrong_content_do_no_harm(collector: Collector, wrong: dict[str, Any]) -> None:
    refused, version = collector.receiver.num_refused, collector.receiver.version
    assert not collector.adopt(collector.header(**({"version": version + 1} | wrong)))
    assert collector.receiver.num_refused == refused + 1
    assert collector.adopt(collector.header(version=version + 1))


def test_garbage_on_the_endpoint_of_the_weights_does_not_stop_publications(tmp_path: Path) -> None:
    source, network = random.Random(4), nn.Linear(3, 2)
    publisher, greeting = Publisher(network, socket_dir=tmp_path, run_id="run"), b"\xff" + bytes(8) + b"\x7f\3\0NULL"

    def attack() -> None:
        for _ in range(10):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(str(tmp_path / WEIGHTS_SOCKET))
                with suppress(OSError):
                    stranger.sendall(mutate(greeting + bytes(40) + source.randbytes(100), source))
        publisher.publish(step=0)

    for _ in range(20):
        attack()
    receiver = WeightsReceiver(nn.Linear(3, 2), socket_dir=tmp_path, run_id="run")
    end = time.monotonic() + DEADLINE_S
    while not receiver.adopt():
        assert time.monotonic() < end
        publisher.republish()
        time.sleep(0.01)
    receiver.close()
    publisher.close()
