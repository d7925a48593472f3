"""Connecting to a learner that the test plays: the hello, the welcome, the mapped replay and the self-test."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch

from collector_proc.connect import Connection, open_replay, run_self_test
from collector_proc.writer import ChunkWriter
from shared.checksum import checksum
from shared.config import DeadlineSettings
from shared.errors import HandoverError, TransportError
from shared.handover import Channel, create_memfd_slab
from shared.lifetime import StopFlag, StopRequested
from shared.messages import PROTOCOL, Grant, Hello, Message, Refusal, SelfTest, Welcome
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views

E, K, CAPACITY = 2, 3, 12
CPU = torch.device("cpu")
SPEC = StreamSpec(E, {"policy": ObsSpec((1,), "float32")}, 1)
LAYOUT = plan_layout(SPEC, CAPACITY)
NO_WAIT = DeadlineSettings(start_s=0.05, compile_s=0.05)


@pytest.fixture
def channels() -> tuple[Channel, Channel]:
    """Return the collector's end and the learner's end of a connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)


def connect(channel: Channel, *, alive: Callable[[], None] = lambda: None) -> Connection:
    return open_replay(channel, SPEC, NO_WAIT, run_id="run", incarnation=4, device=CPU, alive=alive)


def welcome(num_bytes: int = LAYOUT.num_bytes) -> Welcome:
    return Welcome("memfd", num_bytes, CAPACITY, "", [], test_row=6, random_frames=51, agent_steps=70)


def received(channel: Channel) -> Message:
    message = channel.receive()
    assert message is not None
    return message[0]


def test_the_hello_describes_the_simulators_stream_and_the_welcome_describes_the_run(channels):
    collector, learner = channels
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection = connect(collector)
    hello = received(learner)
    assert isinstance(hello, Hello)
    assert (hello.protocol, hello.run_id, hello.incarnation) == (PROTOCOL, "run", 4)
    assert StreamSpec.from_dict(hello.spec) == SPEC
    assert (connection.test_row, connection.random_ticks, connection.agent_steps) == (6, 26, 70)
    connection.ring["reward"][5, 1] = 0.5
    assert ring_views(slab, LAYOUT)["reward"][5, 1] == 0.5, "both processes see the same memory"


def test_the_self_test_writes_its_pattern_to_the_rows_that_the_welcome_names(channels):
    collector, learner = channels
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection = connect(collector)
    received(learner)
    writer = ChunkWriter(connection.ring, connection.layout, ticks=K, device=CPU)
    run_self_test(connection, writer, alive=lambda: None)
    test, ring = received(learner), ring_views(slab, LAYOUT)
    assert isinstance(test, SelfTest)
    rows = [ring[entry.key][6 : 6 + K] for entry in LAYOUT.fields]
    assert test.checksum == checksum(rows) and test.num_bytes == sum(entry.nbytes for entry in rows)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Refusal("the run has another id"), "the learner refused this collector: the run has another id"),
        (Grant(0, 0, 0), "answered the hello with Grant; expected Welcome; start"),
        (welcome(num_bytes=4096), f"has 4096 bytes; expected {LAYOUT.num_bytes} .*; start"),
        (None, "waited .* for the learner's welcome"),
    ],
)
def test_without_a_suitable_welcome_connecting_fails(channels, answer, error):
    collector, learner = channels
    if answer is not None:
        learner.send(answer)
    with pytest.raises(TransportError, match=error):
        connect(collector)


def test_a_stop_ends_the_wait_for_the_welcome(channels):
    collector, _ = channels
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(StopRequested):
        connect(collector, alive=stop.check)


class NeverDone:
    """A copier whose copies never finish, like those of GPUs that cannot reach each other."""

    num_buffers = 1

    def start(self, pairs):
        list(pairs)
        return self

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("the self-test must not wait without a deadline")

    def block_stream(self) -> None:
        """Nothing to do."""


def test_a_self_test_whose_copies_never_finish_ends_with_the_fix(channels):
    collector, learner = channels
    _, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection, calls = connect(collector), []
    writer = ChunkWriter(connection.ring, connection.layout, ticks=K, device=CPU, copier=NeverDone())
    with pytest.raises(HandoverError, match=r"not finished after 0.02 s; expected .*replay_buffer.gpu_storage=false"):
        run_self_test(connection, writer, alive=lambda: calls.append(1), limit_s=0.02)
    assert calls, "the wait reports progress"


def test_bytes_of_an_earlier_self_test_do_not_pass(channels):
    collector, learner = channels
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection, ring = connect(collector), ring_views(slab, LAYOUT)
    writer = ChunkWriter(connection.ring, connection.layout, ticks=K, device=CPU)
    sums = [writer.write_pattern(6, nonce=nonce)[0] for nonce in (1, 2)]
    assert sums[0] != sums[1] == checksum(ring[entry.key][6 : 6 + K] for entry in LAYOUT.fields)
