"""Where the replay lies: on the GPU if the collector can write there, otherwise in host memory, or the run refuses.

The GPU's memory is played by plain memory that has no descriptor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from collector_proc.writer import ChunkWriter
from learner_proc import handshake, link
from learner_proc.handshake import Handshake
from learner_proc.link import CollectorLink
from learner_proc.replay import Replay
from learner_proc.startup import allocate_replay
from shared.errors import HandoverError
from shared.geometry import Geometry
from shared.handover import Disconnected
from shared.messages import Grant, MappingFailed, Refusal, SelfTest, Welcome
from shared.process import Process
from shared.socket_folder import obtain_secret
from shared.stream import StreamSpec, plan_layout
from tests.fakes.scripted_collector import ScriptedCollector
from tests.processes import DEADLINE_S

CPU = torch.device("cpu")
REASON = "the collector cannot map the replay: no CUDA IPC"


class Scene:
    """A link whose replay is on a GPU that is played by plain memory. `slabs`: every slab that was allocated there."""

    def __init__(self, process: Process, folder: Path, gpu_storage: bool | None) -> None:
        self.slabs: list[torch.Tensor] = []
        settings, self.folder = process.settings, folder
        geometry = Geometry.of(settings)

        def allocate(spec: StreamSpec, on_gpu: bool) -> tuple[Replay, int | None]:
            if not on_gpu:
                return allocate_replay(spec, settings, geometry, device=CPU)
            layout = plan_layout(spec, geometry.capacity)
            self.slabs.append(torch.zeros(layout.num_bytes, dtype=torch.uint8))
            return Replay(self.slabs[-1], layout, ticks_per_chunk=8, seed=0, device=CPU), None

        made = Handshake(
            run_id="run", secret=obtain_secret(folder), num_envs=2, allocate=allocate, random_frames=lambda: 0,
            agent_steps=lambda: 0, gpu_storage=gpu_storage, log=process.log,
        )  # fmt: skip
        self.link = CollectorLink(folder, made, check_sums=False, log=process.log)

    @property
    def replay(self) -> Replay:
        assert self.link.shared is not None
        return self.link.shared.replay

    def poll(self) -> None:
        for _ in range(3):
            self.link.poll()

    def connect(self) -> ScriptedCollector:
        """Return a collector whose hello was sent and read."""
        collector = ScriptedCollector(self.folder)
        collector.send_hello()
        self.poll()
        return collector

    def stream_on_gpu(self) -> ScriptedCollector:
        """Return a collector that has passed its self-test on the GPU's memory."""
        collector = self.connect()
        welcome = offered(collector, "cuda_ipc")
        writer = ChunkWriter(self.replay.views, self.replay.layout, ticks=8, device=CPU)
        collector.channel.send(SelfTest(*writer.write_pattern(welcome.test_row, nonce=welcome.nonce)))
        self.poll()
        assert isinstance(collector.receive(), Grant)
        return collector


@pytest.fixture
def scene(process, tmp_path, monkeypatch):
    """Return a function that makes a scene for a value of replay_buffer.gpu_storage."""
    made: list[Scene] = []
    monkeypatch.setattr(handshake, "export_cuda_slab", lambda slab: ("GPU-1", [b"handle"]))

    def make(gpu_storage: bool | None = None) -> Scene:
        made.append(Scene(process, tmp_path, gpu_storage))
        return made[-1]

    yield make
    for one in made:
        one.link.close()


@pytest.fixture
def no_export(monkeypatch):
    def fail(slab):
        raise HandoverError("CUDA cannot share the replay's memory")

    monkeypatch.setattr(handshake, "export_cuda_slab", fail)


def offered(collector: ScriptedCollector, transport: str) -> Welcome:
    welcome = collector.receive()
    assert isinstance(welcome, Welcome) and welcome.transport == transport, welcome
    return welcome


def pass_self_test_in_host_memory(scene: Scene, collector: ScriptedCollector) -> None:
    assert collector.receive_welcome().transport == "memfd"
    collector.send_self_test()
    scene.poll()
    assert isinstance(collector.receive(), Grant) and scene.link.streaming is not None
    assert scene.link.streaming.shared is scene.link.shared and scene.link.streaming.shared.fd is not None


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


def check_fallen_back(scene: Scene, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    """Check that the GPU's memory was freed, and that one line names the reason and the setting."""
    (slab,) = scene.slabs
    assert slab.untyped_storage().size() == 0, "the GPU's memory is free again"
    (line,) = warnings_of(capsys)
    assert reason in line and "replay_buffer.gpu_storage=false" in line


def test_memory_that_cuda_cannot_export_is_replaced_by_host_memory(scene, no_export, capsys):
    one = scene()
    pass_self_test_in_host_memory(one, one.connect())
    check_fallen_back(one, capsys, "CUDA cannot share the replay's memory")


def test_memory_that_the_collector_cannot_use_is_replaced_by_host_memory(scene, capsys):
    one = scene()
    collector = one.connect()
    offered(collector, "cuda_ipc")
    collector.channel.send(MappingFailed(REASON))
    one.poll()
    pass_self_test_in_host_memory(one, collector)
    check_fallen_back(one, capsys, REASON)
    assert one.link.num_welcomed == 1, "it is still the same collector"


def test_memory_in_which_the_pattern_is_not_found_is_replaced_by_host_memory(scene, capsys):
    one = scene()
    collector = one.connect()
    offered(collector, "cuda_ipc")
    collector.channel.send(SelfTest(12345, 100, 0.1))
    one.poll()
    pass_self_test_in_host_memory(one, collector)
    check_fallen_back(one, capsys, "self-test failed")


def test_the_collector_after_one_that_fell_back_is_offered_host_memory_at_once(scene):
    one = scene()
    collector = one.connect()
    offered(collector, "cuda_ipc")
    collector.channel.send(MappingFailed(REASON))
    one.poll()
    collector.channel.close()
    one.poll()
    pass_self_test_in_host_memory(one, one.connect())


@pytest.mark.parametrize(("gpu_storage", "transport"), [(True, "cuda_ipc"), (False, "memfd")])
@pytest.mark.parametrize("message", [MappingFailed(REASON), SelfTest(12345, 100, 0.1)])
def test_memory_that_the_user_has_chosen_is_not_replaced(scene, gpu_storage, transport, message):
    one = scene(gpu_storage)
    collector = one.connect()
    offered(collector, transport)
    collector.channel.send(message)
    one.poll()
    refusal = collector.receive()
    expected = REASON if isinstance(message, MappingFailed) else "self-test failed"
    assert isinstance(refusal, Refusal) and expected in refusal.reason
    assert one.link.streaming is None and one.replay.num_granted == 0


def test_memory_that_the_user_has_chosen_and_cuda_cannot_export_ends_the_learner(scene, no_export):
    with pytest.raises(HandoverError, match="CUDA cannot share"):
        scene(True).connect()


def lost_after_streaming(scene: Callable[..., Scene], gpu_storage: bool | None = None) -> Scene:
    """Return a scene in which a collector has streamed into the GPU's memory and has ended."""
    one = scene(gpu_storage)
    one.stream_on_gpu().channel.close()
    one.poll()
    return one


def test_memory_that_the_run_has_used_is_never_replaced(scene, capsys):
    one = lost_after_streaming(scene)
    restarted = one.connect()
    offered(restarted, "cuda_ipc")
    restarted.channel.send(MappingFailed(REASON))
    one.poll()
    refusal = restarted.receive()
    assert isinstance(refusal, Refusal) and f"{REASON}; this run has already used the replay" in refusal.reason
    assert one.replay.slab is one.slabs[0] and one.slabs[0].untyped_storage().size() > 0


def test_at_the_end_the_replay_on_the_gpu_is_freed_after_the_collector_has_closed_its_end(scene, monkeypatch):
    """The collector unmaps the replay before it closes its end; until then it may send a commit."""
    monkeypatch.setattr(link, "UNMAP_S", DEADLINE_S)
    one, sizes = scene(), []
    collector = one.stream_on_gpu()
    collector.channel.send(MappingFailed(REASON))

    def collect_to_the_end() -> None:
        with pytest.raises(Disconnected):
            collector.receive()
        sizes.append(one.slabs[0].untyped_storage().size())
        collector.channel.close()

    thread = threading.Thread(target=collect_to_the_end)
    thread.start()
    one.link.close()
    thread.join()
    assert sizes[0] > 0 and one.slabs[0].untyped_storage().size() == 0


def test_at_the_end_the_learner_waits_no_longer_than_it_may(scene, monkeypatch):
    monkeypatch.setattr(link, "UNMAP_S", 0.05)
    one = scene()
    collector = one.stream_on_gpu()
    one.link.close()
    assert one.slabs[0].untyped_storage().size() == 0
    with pytest.raises(Disconnected):
        collector.receive()


@pytest.mark.parametrize("gpu_storage", [None, True])
def test_a_restarted_collector_is_refused_if_cuda_cannot_export_again_and_the_learner_lives(
    scene, monkeypatch, gpu_storage
):
    one = lost_after_streaming(scene, gpu_storage)

    def fail(slab):
        raise HandoverError("CUDA cannot share the replay's memory")

    monkeypatch.setattr(handshake, "export_cuda_slab", fail)
    refusal = one.connect().receive()
    assert isinstance(refusal, Refusal) and "CUDA cannot share" in refusal.reason
    assert one.replay.num_granted == 0
