"""Copies that run beside the ticks: direct copies on a CPU, and copies on a side stream on a GPU."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from collector_proc.acting_policy import ActingPolicy
from collector_proc.arrival_mover import ArrivalMover
from collector_proc.copies import DirectCopier, DoubleBuffer, StreamCopier, copier_between
from collector_proc.episodes import EpisodeTracker
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from shared.config import CollectorSettings, NetworkSettings
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.late_copier import LateCopier

CPU = torch.device("cpu")
E, K = 64, 8
SPEC = StreamSpec(E, {"policy": ObsSpec((32,), "float32")}, 4)


def test_a_copy_within_host_memory_is_done_when_start_returns():
    copier = copier_between(CPU, CPU)
    assert isinstance(copier, DirectCopier)
    target, source = torch.zeros(3), torch.arange(3.0)
    copy = copier.start([(target, source)])
    source.fill_(9.0)
    assert copy.done() and target.tolist() == [0.0, 1.0, 2.0]


def test_two_buffers_alternate_and_one_becomes_current_only_after_the_last_copy_out_of_it():
    copier, ring = LateCopier(), torch.zeros(3)
    buffers = DoubleBuffer(copier, lambda: torch.zeros(1))
    first = buffers.current
    for turn in range(3):
        buffers.current.fill_(turn + 1.0)
        buffers.send([(ring[turn : turn + 1], buffers.current)])
        assert (buffers.current is first) == (turn == 1)
    assert ring.tolist() == [1.0, 2.0, 0.0] and copier.num_pending == 1 and copier.num_blocked_streams == 2


class RecordedCuda:
    """Replaces the streams and events of torch.cuda, and records in order what is called on them."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.finished: set[str] = set()  # names of the streams whose events have passed
        recorded = self

        class Stream:
            def __init__(self, device, name: str = "side") -> None:
                self.name = f"{name} {device}"

            def wait_stream(self, other) -> None:
                recorded.calls.append((self.name, "waits for", other.name))

            def wait_event(self, event) -> None:
                recorded.calls.append((self.name, "waits for event of", event.stream_name))

        class Event:
            def record(self, stream) -> None:
                self.stream_name = stream.name
                recorded.calls.append(("event", "recorded on", stream.name))

            def query(self) -> bool:
                return self.stream_name in recorded.finished

        @contextlib.contextmanager
        def within(stream):
            recorded.calls.append(("enter", stream.name))
            yield
            recorded.calls.append(("leave", stream.name))

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "current"))


def test_a_copy_between_gpus_follows_the_current_stream_and_an_event_on_each_gpu_follows_the_copy(monkeypatch):
    cuda = RecordedCuda(monkeypatch)
    copier = copier_between(torch.device("cuda:0"), torch.device("cuda:1"))
    target = torch.zeros(2)

    def pairs():
        cuda.calls.append(("copy",))
        yield target, torch.ones(2)

    copy = copier.start(pairs())
    assert cuda.calls == [
        ("side cuda:0", "waits for", "current cuda:0"),
        ("enter", "side cuda:0"),
        ("copy",),
        ("leave", "side cuda:0"),
        ("event", "recorded on", "side cuda:0"),
        ("event", "recorded on", "current cuda:1"),
    ]
    assert target.tolist() == [1.0, 1.0] and copier.num_buffers == 2
    done = []
    for name in ("side cuda:0", "current cuda:1"):
        done.append(copy.done())
        cuda.finished.add(name)
    assert done == [False, False] and copy.done(), "the copy is done only when both events have passed"
    cuda.calls.clear()
    copy.block_stream()
    assert cuda.calls == [
        ("current cuda:0", "waits for event of", "side cuda:0"),
        ("current cuda:0", "waits for event of", "current cuda:1"),
    ]


@pytest.mark.parametrize("target", ["cuda:0", "cpu"])
def test_a_copy_on_one_gpu_or_to_the_host_is_done_when_one_event_has_passed(monkeypatch, target):
    cuda = RecordedCuda(monkeypatch)
    copy = copier_between(torch.device("cuda:0"), torch.device(target)).start([])
    assert [call for call in cuda.calls if call[0] == "event"] == [("event", "recorded on", "side cuda:0")]
    assert not copy.done()
    cuda.finished.add("side cuda:0")
    assert copy.done()


def gpu_arrival(tick: int, device: torch.device) -> Arrival:
    """Return an arrival with observation 1000 * environment + tick.

    Environment 0 begins an episode with every chunk, and environment 1 ends one with every chunk.
    """
    value = (1000.0 * torch.arange(E, device=device) + tick)[:, None].expand(E, 32).contiguous()
    first = torch.arange(E, device=device) == (0 if tick % K == 0 else -1)
    last = torch.arange(E, device=device) == (1 if tick % K == K - 1 else -1)
    reward = torch.ones(E, device=device)
    return Arrival({"policy": value}, reward, first, last, torch.zeros_like(last), acting_obs={"policy": value})


def keep_busy(device: torch.device) -> None:
    """Queue some tenths of a second of work on the current stream."""
    with torch.cuda.device(device):
        torch.cuda._sleep(500_000_000)  # cycles of the GPU's clock; torch's own tests hold a stream in this way


def gpu_writer(slab_device: str, capacity: int = 3 * K):
    device, layout = torch.device("cuda:0"), plan_layout(SPEC, capacity)
    if slab_device == "cpu":
        slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=True)
    else:
        slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=slab_device)
    copier = copier_between(device, slab.device)
    assert isinstance(copier, StreamCopier)
    ring = ring_views(slab, layout)
    return ChunkWriter(ring, layout, ticks=K, device=device, copier=copier), ring, copier


def wait_until_done(writer: ChunkWriter) -> None:
    end = time.monotonic() + 300
    while not writer.done():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("slab_device", ["cuda:0", "cuda:1", "cpu"])
def test_on_a_gpu_a_chunk_is_copied_after_its_rows_are_computed_and_before_they_are_overwritten(slab_device):
    if slab_device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda:0")
    writer, ring, _ = gpu_writer(slab_device)
    keep_busy(device)
    torch.cuda.synchronize()
    for chunk in range(3):
        keep_busy(device)
        for k in range(K):
            writer.add(gpu_arrival(chunk * K + k, device), torch.zeros(E, 4, device=device), chunk)
        writer.write(chunk * K)
        assert not writer.done(), "the rows are not computed yet"
    wait_until_done(writer)
    found = ring["obs", "policy"][:, :, 0].cpu()
    assert torch.equal(found, 1000.0 * torch.arange(E) + torch.arange(3.0 * K)[:, None])
    assert ring["policy_version"].tolist() == [chunk for chunk in range(3) for _ in range(K)]


@pytest.mark.gpu
def test_on_a_gpu_a_buffer_is_filled_again_only_after_it_has_been_copied():
    device, turns = torch.device("cuda:0"), 8
    ring = torch.zeros(turns, 64, device=device)
    buffers = DoubleBuffer(StreamCopier(device), lambda: torch.zeros(64, device=device))
    torch.cuda._sleep(5_000_000)
    for turn in range(turns):
        buffers.current.fill_(float(turn))
        buffers.send([(ring[turn], buffers.current)])
    torch.cuda.synchronize()
    assert ring[:, 0].tolist() == [float(turn) for turn in range(turns)]


@pytest.mark.gpu
def test_on_a_gpu_no_tick_waits_for_the_device():
    device = torch.device("cuda:0")
    writer, _, copier = gpu_writer("cpu")
    acting = ActingPolicy(
        SPEC, NetworkSettings(), CollectorSettings(eval_envs=4), device=device, seed=0, random_ticks=2
    )
    tracker = EpisodeTracker(SPEC, ticks=K, evaluations=acting.evaluations, copier=copier)
    mover, action = ArrivalMover(device), torch.zeros(E, 4, device=device)
    arrivals = [gpu_arrival(tick, device) for tick in range(2 * K)]
    for chunk in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for k in range(K):
                arrival = mover.move(arrivals[chunk * K + k])
                action = torch.where(arrival.is_first[:, None], 0.0, action)
                writer.add(arrival, action, chunk)
                tracker.add(arrival, random=False)
                action = acting.act(arrival, action, version=1)
            tracker.send()
            writer.write(chunk * K)
            writer.done()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wait_until_done(writer)
        finished = tracker.take(10)
        assert len(finished.returns) == len(finished.lengths) == finished.num_episodes == 1
        assert finished.steps == K * E - (chunk == 0), "environment 0's very first row is not an agent step"
