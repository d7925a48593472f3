"""Connecting to a learner that the test plays: the hello, the welcome, the mapped replay and the self-test."""

from __future__ import annotations

import mmap
import re
import socket
import weakref
from collections.abc import Callable

import pytest
import torch

from collector_proc import connect as connecting
from collector_proc.connect import Connection, open_replay
from collector_proc.copies import CompletedCopy
from collector_proc.writer import ChunkWriter
from shared.checksum import checksum
from shared.config import DeadlineSettings
from shared.errors import HandoverError, TransportError
from shared.handover import Channel, create_memfd_slab
from shared.lifetime import StopFlag, StopRequested
from shared.messages import PROTOCOL, Grant, Hello, MappingFailed, Message, Refusal, SelfTest, Welcome
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views

E, K, CAPACITY = 2, 3, 12
SECRET = bytes(range(32))
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
    return open_replay(channel, SPEC, NO_WAIT, run_id="run", secret=SECRET, incarnation=4, device=CPU, alive=alive)


def welcome(num_bytes: int = LAYOUT.num_bytes, *, nonce: int = 0) -> Welcome:
    return Welcome(SECRET, "memfd", num_bytes, CAPACITY, "", [], 6, random_frames=51, agent_steps=70, nonce=nonce)


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
    assert (connection.welcome.test_row, connection.random_ticks, connection.welcome.agent_steps) == (6, 26, 70)
    connection.ring["reward"][5, 1] = 0.5
    assert ring_views(slab, LAYOUT)["reward"][5, 1] == 0.5, "both processes see the same memory"


def test_the_self_test_writes_its_pattern_to_the_rows_that_the_welcome_names(channels):
    collector, learner = channels
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection = connect(collector)
    received(learner)
    learner.send(Grant(5, 6, 0))
    _, first = connection.pass_self_test(ticks=K)
    test, ring = received(learner), ring_views(slab, LAYOUT)
    assert isinstance(test, SelfTest) and first == Grant(5, 6, 0)
    rows = [ring[entry.key][6 : 6 + K] for entry in LAYOUT.fields]
    assert test.checksum == checksum(rows) and test.num_bytes == sum(entry.nbytes for entry in rows)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Refusal("the run has another id"), "the learner refused this collector: the run has another id"),
        (Grant(0, 0, 0), "answered with Grant; expected Welcome; start"),
        (welcome(num_bytes=4096), f"has 4096 bytes; expected {LAYOUT.num_bytes} .*; start"),
    ],
)
def test_without_a_suitable_welcome_every_start_would_fail(channels, answer, error):
    collector, learner = channels
    learner.send(answer)
    with pytest.raises(HandoverError, match=error):
        connect(collector)


def test_without_a_welcome_connecting_fails_at_its_deadline_and_another_start_may_succeed(channels):
    collector, _ = channels
    with pytest.raises(TransportError, match=r"waited .* for the learner's welcome") as caught:
        connect(collector)
    assert not isinstance(caught.value, HandoverError)


def test_a_stop_ends_the_wait_for_the_welcome(channels):
    collector, _ = channels
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(StopRequested):
        connect(collector, alive=stop.check)


def test_a_learner_that_refuses_the_pattern_is_an_error_with_its_reason(channels):
    collector, learner = channels
    _, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    learner.send(Refusal("the self-test found a wrong byte"))
    with pytest.raises(HandoverError, match="refused this collector: the self-test found a wrong byte"):
        connect(collector).pass_self_test(ticks=K)


class GpuMemory:
    """Plays the memory of the learner's GPU. `mapping`: a weak reference to what the collector has mapped."""

    welcome = Welcome(SECRET, "cuda_ipc", LAYOUT.num_bytes, CAPACITY, "GPU-1", [b"handle"], 6, 51, 70)

    def __init__(self) -> None:
        self.mapping: Callable[[], mmap.mmap | None] = lambda: None

    def map(self, *arguments, writer: torch.device) -> torch.Tensor:
        memory = mmap.mmap(-1, LAYOUT.num_bytes)
        self.mapping = weakref.ref(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.fixture
def gpu(monkeypatch) -> GpuMemory:
    memory = GpuMemory()
    monkeypatch.setattr(connecting, "import_cuda_slab", memory.map)
    return memory


def send_host_memory(learner: Channel) -> torch.Tensor:
    """Offer host memory and return it."""
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    return slab


def mapping_fails(monkeypatch) -> None:
    def fail(*arguments, **options):
        raise HandoverError("the collector cannot map the replay")

    monkeypatch.setattr(connecting, "import_cuda_slab", fail)


def test_gpu_memory_that_cannot_be_mapped_is_reported_and_the_next_offer_is_mapped(channels, monkeypatch):
    collector, learner = channels
    mapping_fails(monkeypatch)
    learner.send(GpuMemory.welcome)
    slab = send_host_memory(learner)
    connection = connect(collector)
    received(learner)
    assert received(learner) == MappingFailed("the collector cannot map the replay")
    connection.ring["reward"][5, 1] = 0.5
    assert ring_views(slab, LAYOUT)["reward"][5, 1] == 0.5


def test_a_learner_that_offers_no_other_memory_is_an_error_with_its_reason(channels, monkeypatch):
    collector, learner = channels
    mapping_fails(monkeypatch)
    learner.send(GpuMemory.welcome)
    learner.send(Refusal("the collector cannot map the replay; set replay_buffer.gpu_storage=false"))
    with pytest.raises(HandoverError, match=r"refused .*cannot map the replay; set replay_buffer.gpu_storage=false"):
        connect(collector)


class BrokenAtFirst:
    """A copier that copies nothing the first time: it is then never done, or it raises `error`."""

    num_buffers = 1

    def __init__(self, error: Exception | None = None) -> None:
        self._error, self._is_first = error, True

    def start(self, pairs):
        was_first, self._is_first = self._is_first, False
        if was_first and self._error is not None:
            raise type(self._error)(*self._error.args)  # a new one, because an error refers to what raised it
        for target, source in pairs:
            target.copy_(source)
        return self if was_first else CompletedCopy()

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("the self-test must not wait without a deadline")

    def block_stream(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    ("error", "reason", "stays_mapped"),
    [
        (None, "not finished after 0.02 s; expected .*replay_buffer.gpu_storage=false", True),
        (RuntimeError("CUDA error: peer access\nmore"), "failed: CUDA error: peer access; .*gpu_storage=false", False),
    ],
)
def test_gpu_memory_that_cannot_be_written_is_reported_and_the_next_offer_is_tested(
    channels, gpu, error, reason, stays_mapped
):
    """Memory stays mapped only while a copy into it may still run."""
    collector, learner = channels
    learner.send(GpuMemory.welcome)
    slab, calls = send_host_memory(learner), []
    learner.send(Grant(5, 6, 0))
    connection = connect(collector, alive=lambda: calls.append(1))
    writer, first = connection.pass_self_test(ticks=K, copier=BrokenAtFirst(error), limit_s=0.02)
    assert (gpu.mapping() is not None) == stays_mapped and first == Grant(5, 6, 0)
    hello, failed, test = received(learner), received(learner), received(learner)
    assert isinstance(hello, Hello) and isinstance(failed, MappingFailed) and isinstance(test, SelfTest)
    assert re.search(reason, failed.reason)
    ring = ring_views(slab, LAYOUT)
    assert test.checksum == checksum(ring[entry.key][6 : 6 + K] for entry in LAYOUT.fields)
    assert writer.done() and bool(calls) == stays_mapped, "the wait reports progress"


def test_gpu_memory_is_unmapped_before_its_failure_is_reported(channels, gpu, monkeypatch):
    """The learner frees the memory as soon as it reads the message."""
    collector, learner = channels
    learner.send(GpuMemory.welcome)
    send_host_memory(learner)
    learner.send(Grant(5, 6, 0))
    connection, mapped = connect(collector), []
    send = collector.send

    def watched(message, *arguments, **options):
        if isinstance(message, MappingFailed):
            mapped.append(gpu.mapping())
        send(message, *arguments, **options)

    monkeypatch.setattr(collector, "send", watched)
    connection.pass_self_test(ticks=K, copier=BrokenAtFirst(RuntimeError("CUDA error")))
    assert mapped == [None]


def test_if_the_learner_does_not_find_the_pattern_the_memory_that_it_offers_next_is_tested(channels, gpu):
    collector, learner = channels
    learner.send(GpuMemory.welcome)
    slab = send_host_memory(learner)
    learner.send(Grant(5, 6, 0))
    connection = connect(collector)
    connection.pass_self_test(ticks=K)
    assert gpu.mapping() is None, "the GPU's memory is not mapped any more"
    assert [type(received(learner)) for _ in range(3)] == [Hello, SelfTest, SelfTest]
    assert ring_views(slab, LAYOUT)["reward"][6 : 6 + K].any()


@pytest.mark.parametrize("is_copying", [False, True])
def test_the_replay_is_unmapped_before_the_connection_ends_unless_a_copy_is_running(
    channels, gpu, monkeypatch, is_copying
):
    collector, learner = channels
    learner.send(GpuMemory.welcome)
    learner.send(Grant(5, 6, 0))
    connection, mapped = connect(collector), []
    writer, _ = connection.pass_self_test(ticks=K)
    monkeypatch.setattr(writer, "done", lambda: not is_copying)
    monkeypatch.setattr(collector, "close", lambda: mapped.append(gpu.mapping() is not None))
    connection.close(writer)
    assert mapped == [is_copying]


def test_too_little_gpu_memory_for_the_self_test_is_no_reason_for_other_memory(channels, gpu):
    collector, learner = channels
    learner.send(GpuMemory.welcome)
    with pytest.raises(torch.OutOfMemoryError):
        connect(collector).pass_self_test(ticks=K, copier=BrokenAtFirst(torch.OutOfMemoryError("CUDA out of memory")))


def test_waiting_for_the_result_of_the_self_test_has_a_deadline(channels):
    collector, learner = channels
    send_host_memory(learner)
    with pytest.raises(TransportError, match="for the result of the self-test"):
        connect(collector).pass_self_test(ticks=K)


def test_the_welcomes_nonce_selects_the_pattern():
    checksums = []
    for nonce in (1, 2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        collector, learner = Channel(ours), Channel(theirs)
        _, descriptor = create_memfd_slab(LAYOUT.num_bytes)
        learner.send(welcome(nonce=nonce), (descriptor,))
        learner.send(Grant(5, 6, 0))
        connect(collector).pass_self_test(ticks=K)
        received(learner)
        test = received(learner)
        assert isinstance(test, SelfTest)
        checksums.append(test.checksum)
    assert checksums[0] != checksums[1]


def test_bytes_of_an_earlier_self_test_do_not_pass(channels):
    collector, learner = channels
    slab, descriptor = create_memfd_slab(LAYOUT.num_bytes)
    learner.send(welcome(), (descriptor,))
    connection, ring = connect(collector), ring_views(slab, LAYOUT)
    writer = ChunkWriter(connection.ring, connection.layout, ticks=K, device=CPU)
    sums = [writer.write_pattern(6, nonce=nonce)[0] for nonce in (1, 2)]
    assert sums[0] != sums[1] == checksum(ring[entry.key][6 : 6 + K] for entry in LAYOUT.fields)
