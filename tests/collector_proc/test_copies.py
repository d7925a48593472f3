"""Copies beside the tick: done at once on a CPU; on a GPU behind the current stream, and nobody waits for them."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from collector_proc.actor import Actor
from collector_proc.copies import DirectCopier, Landing, Stages, StreamCopier, copier_between
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter, EpisodeTracker
from shared.config import CollectorSettings, NetworkSettings
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.late_copier import LateCopier

CPU = torch.device("cpu")
E, K = 64, 8
SPEC = StreamSpec(E, {"policy": ObsSpec((32,), "float32")}, 4)


def test_between_host_and_host_a_copy_is_there_when_start_returns():
    copier = copier_between(CPU, CPU)
    assert isinstance(copier, DirectCopier)
    target, source = torch.zeros(3), torch.arange(3.0)
    flight = copier.start([(target, source)])
    source.fill_(9.0)
    assert flight.arrived() and target.tolist() == [0.0, 1.0, 2.0]


def test_stages_take_turns_and_a_stage_under_way_is_joined_before_it_is_current_again():
    copier, ring = LateCopier(), torch.zeros(3)
    stages = Stages(copier, lambda: torch.zeros(1))
    first = stages.current
    for turn in range(3):
        stages.current.fill_(turn + 1.0)
        stages.send([(ring[turn : turn + 1], stages.current)])
        assert (stages.current is first) == (turn == 1)
    assert ring.tolist() == [1.0, 2.0, 0.0] and copier.under_way == 1 and copier.num_late_joins == 2


def test_an_arrival_that_lies_on_the_acting_device_is_passed_on_as_it_is():
    arrival = host_arrival(0)
    assert Landing(CPU)(arrival) is arrival


class Streams:
    """Stands where torch.cuda stands and writes down, in order, what its streams and events were told."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.done: set[str] = set()  # streams whose events have passed
        scene = self

        class Stream:
            def __init__(self, device, name: str = "side") -> None:
                self.name = f"{name} {device}"

            def wait_stream(self, other) -> None:
                scene.calls.append((self.name, "waits for", other.name))

            def wait_event(self, event) -> None:
                scene.calls.append((self.name, "waits for event of", event.behind))

        class Event:
            def record(self, stream) -> None:
                self.behind = stream.name
                scene.calls.append(("event", "behind", stream.name))

            def query(self) -> bool:
                return self.behind in scene.done

        @contextlib.contextmanager
        def within(stream):
            scene.calls.append(("enter", stream.name))
            yield
            scene.calls.append(("leave", stream.name))

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "current"))


def test_copies_lie_behind_the_current_stream_and_events_behind_them_on_both_gpus(monkeypatch):
    streams = Streams(monkeypatch)
    copier = copier_between(torch.device("cuda:0"), torch.device("cuda:1"))
    target = torch.zeros(2)

    def pairs():
        streams.calls.append(("copy",))
        yield target, torch.ones(2)

    flight = copier.start(pairs())
    assert streams.calls == [
        ("side cuda:0", "waits for", "current cuda:0"),
        ("enter", "side cuda:0"),
        ("copy",),
        ("leave", "side cuda:0"),
        ("event", "behind", "side cuda:0"),
        ("event", "behind", "current cuda:1"),
    ]
    assert target.tolist() == [1.0, 1.0] and copier.num_stages == 2
    arrived = []
    for name in ("side cuda:0", "current cuda:1"):
        arrived.append(flight.arrived())
        streams.done.add(name)
    assert arrived == [False, False] and flight.arrived(), "both ends count"
    streams.calls.clear()
    flight.join()
    assert streams.calls == [
        ("current cuda:0", "waits for event of", "side cuda:0"),
        ("current cuda:0", "waits for event of", "current cuda:1"),
    ]


@pytest.mark.parametrize("target", ["cuda:0", "cpu"])
def test_on_one_gpu_and_towards_the_host_one_event_says_that_copies_have_arrived(monkeypatch, target):
    streams = Streams(monkeypatch)
    flight = copier_between(torch.device("cuda:0"), torch.device(target)).start([])
    assert [call for call in streams.calls if call[0] == "event"] == [("event", "behind", "side cuda:0")]
    assert not flight.arrived()
    streams.done.add("side cuda:0")
    assert flight.arrived()


def host_arrival(tick: int, device: torch.device = CPU) -> Arrival:
    """Observation 1000 * environment + tick; environment 0 begins with every chunk, environment 1 ends with it."""
    value = (1000.0 * torch.arange(E, device=device) + tick)[:, None].expand(E, 32).contiguous()
    first = torch.arange(E, device=device) == (0 if tick % K == 0 else -1)
    last = torch.arange(E, device=device) == (1 if tick % K == K - 1 else -1)
    reward = torch.ones(E, device=device)
    return Arrival({"policy": value}, reward, first, last, torch.zeros_like(last), acting_obs={"policy": value})


def busy(device: torch.device) -> None:
    """Some tenths of a second of work on the current stream."""
    matrix = torch.randn(8192, 8192, device=device)
    for _ in range(16):
        matrix = matrix @ matrix
        matrix /= matrix.norm()


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


def land(writer: ChunkWriter) -> None:
    end = time.monotonic() + 60
    while not writer.arrived():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("slab_device", ["cuda:0", "cuda:1", "cpu"])
def test_on_a_gpu_a_chunk_comes_after_the_rows_behind_it_and_the_next_rows_leave_it_alone(slab_device):
    if slab_device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    device = torch.device("cuda:0")
    writer, ring, _ = gpu_writer(slab_device)
    busy(device)
    torch.cuda.synchronize()
    for chunk in range(3):
        busy(device)
        for k in range(K):
            writer.add(host_arrival(chunk * K + k, device), torch.zeros(E, 4, device=device), chunk)
        writer.write(chunk * K)
        assert not writer.arrived(), "the rows are not even computed yet"
    land(writer)
    found = ring["obs", "policy"][:, :, 0].cpu()
    assert torch.equal(found, 1000.0 * torch.arange(E) + torch.arange(3.0 * K)[:, None])
    assert ring["policy_version"].tolist() == [chunk for chunk in range(3) for _ in range(K)]


@pytest.mark.gpu
def test_on_a_gpu_no_tick_waits_for_the_device():
    device = torch.device("cuda:0")
    writer, _, copier = gpu_writer("cpu")
    actor = Actor(SPEC, NetworkSettings(), CollectorSettings(eval_envs=4), device=device, seed=0, random_ticks=2)
    tracker = EpisodeTracker(SPEC, ticks=K, evaluation=actor.evaluation, resets_inside=True, copier=copier)
    landing, action = Landing(device), torch.zeros(E, 4, device=device)
    arrivals = [host_arrival(tick, device) for tick in range(2 * K)]
    for chunk in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for k in range(K):
                arrival = landing(arrivals[chunk * K + k])
                action = torch.where(arrival.is_first[:, None], 0.0, action)
                writer.add(arrival, action, chunk)
                tracker.add(arrival, random=False)
                action = actor.act(arrival, action, version=1)
            tracker.send()
            writer.write(chunk * K)
            writer.arrived()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        land(writer)
        finished = tracker.take(10)
        assert len(finished.returns) == len(finished.lengths) == finished.num_episodes == 1
        assert finished.steps == K * E


@pytest.mark.gpu
def test_arrivals_of_a_host_simulator_reach_the_gpu_whole():
    device = torch.device("cuda:0")
    landing = Landing(device)
    for tick in range(3):
        sent = host_arrival(tick)
        arrival = landing(sent)
        assert arrival.obs["policy"].device == device and arrival.acting_obs is not None
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            assert torch.equal(getattr(arrival, name).cpu(), getattr(sent, name))
        assert torch.equal(arrival.obs["policy"].cpu(), sent.obs["policy"])
        assert torch.equal(arrival.acting_obs["policy"].cpu(), sent.obs["policy"])
