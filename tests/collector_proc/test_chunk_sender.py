"""Sending a full chunk: the copy to the granted rows, and the commit."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from collector_proc.chunk_sender import ChunkSender
from collector_proc.episodes import EpisodeTracker
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from shared.checksum import checksum
from shared.config import Settings
from shared.errors import TransportError
from shared.handover import Channel
from shared.lifetime import StopFlag
from shared.memory import Memory
from shared.messages import EPISODE_KINDS, Commit, Grant
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.evaluating import evaluations_in
from tests.fakes.fake_process import FakeProgress, fake_process
from tests.fakes.late_copier import LateCopier

E, K, CAPACITY = 2, 3, 12
SPEC = StreamSpec(E, {"policy": ObsSpec((1,), "float32")}, 1)
LAYOUT = plan_layout(SPEC, CAPACITY)
SIMULATOR = SimpleNamespace(frames_per_step=4, num_diverged=3)
GRANT = Grant(seq=8, row=6, version=0)


class Scene:
    """A sender whose copies are done only when the test finishes them."""

    def __init__(
        self,
        *,
        with_checksum: bool = False,
        step_s: float = 60.0,
        stop_s: float = 60.0,
        simulator: Any = SIMULATOR,
    ) -> None:
        settings = Settings()
        settings.replay_buffer.checksum = with_checksum
        settings.deadlines.step_s, settings.deadlines.stop_s = step_s, stop_s
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.learner, self.copier, self.stop = Channel(theirs), LateCopier(), StopFlag()
        self.ring = ring_views(torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8), LAYOUT)
        device = torch.device("cpu")
        self.writer = ChunkWriter(self.ring, LAYOUT, ticks=K, device=device, copier=self.copier)
        evaluations = evaluations_in((1,), E, version=4)
        self.tracker = EpisodeTracker(SPEC, ticks=K, evaluations=evaluations, copier=self.copier)
        self.reported: list[int] = []
        learner: Any = SimpleNamespace(read_grants=lambda: None)
        meter: Any = SimpleNamespace(read=lambda: Memory(10, 20, 30))
        status: Any = SimpleNamespace(report=self.reported.append)
        self.progress = FakeProgress()
        process = fake_process(settings, self.progress, self.stop)
        self.sender = ChunkSender(process, Channel(ours), self.writer, self.tracker, learner, simulator, meter, status)

    def gather(self) -> None:
        """Gather a chunk that is one episode of every environment, with a reward of 1 per step."""
        for tick in range(K):
            first, last = (torch.full((E,), tick == at) for at in (0, K - 1))
            obs = {"policy": (1000.0 * torch.arange(E) + tick)[:, None]}
            arrival = Arrival(obs, torch.where(first, 0.0, 1.0), first, last, torch.zeros_like(last))
            self.writer.add(arrival, torch.zeros(E, 1), 5)
            self.tracker.add(arrival, random=False)

    def commit(self) -> Commit | None:
        received = self.learner.receive()
        assert received is None or isinstance(received[0], Commit)
        return received and cast(Commit, received[0])


def test_a_commit_describes_the_chunk_its_episodes_and_the_memory():
    scene = Scene()
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    scene.copier.finish()
    assert scene.sender.commit_if_done()
    commit = scene.commit()
    assert commit is not None
    assert (commit.seq, commit.row, commit.policy_version, commit.checksum) == (8, 6, 5, 0)
    assert (commit.agent_steps, commit.env_frames, commit.num_diverged) == (2 * E, 2 * E * 4, 3)
    assert struct.unpack("<2f", commit.returns) == (2.0, 2.0) and struct.unpack("<2i", commit.lengths) == (2, 2)
    assert [EPISODE_KINDS[kind] for kind in commit.kinds] == ["train", "eval"] and commit.num_episodes == 2
    assert struct.unpack("<2q", commit.versions) == (0, 4) and commit.eval_steps == 2
    assert (commit.rss_bytes, commit.gpu_bytes, commit.device_bytes) == (10, 20, 30)
    assert scene.ring["obs", "policy"][6:9, 0, 0].tolist() == [0.0, 1.0, 2.0] and scene.reported == [2 * E]


def test_nothing_is_committed_before_the_copy_is_done_and_nothing_twice():
    scene = Scene()
    assert not scene.sender.commit_if_done()
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    assert not scene.sender.commit_if_done() and scene.commit() is None
    scene.copier.finish()
    assert scene.sender.commit_if_done() and scene.commit() is not None
    assert not scene.sender.commit_if_done() and scene.commit() is None


def test_with_the_setting_a_commit_has_the_checksum_of_its_rows():
    scene = Scene(with_checksum=True)
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    scene.copier.finish()
    scene.sender.wait_until_committed()
    commit = scene.commit()
    assert commit is not None
    assert commit.checksum == checksum(scene.ring[entry.key][6:9] for entry in LAYOUT.fields)


def test_a_second_chunk_cannot_be_sent_before_the_first_is_committed():
    scene = Scene()
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    with pytest.raises(AssertionError, match="not committed"):
        scene.sender.send(GRANT, policy_version=5)


def test_waiting_for_a_commit_returns_when_the_copy_is_done_and_at_once_without_a_chunk():
    scene = Scene()
    scene.sender.wait_until_committed()
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    scene.progress.on_advance = scene.copier.finish
    scene.sender.wait_until_committed()
    assert scene.commit() is not None


def test_a_simulator_must_count_the_rows_that_diverged():
    scene = Scene(simulator=SimpleNamespace(frames_per_step=4, num_diverge=3))
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    scene.copier.finish()
    with pytest.raises(AttributeError, match="num_diverged"):
        scene.sender.commit_if_done()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_copy_that_is_never_done_is_an_error_that_names_its_row(stopped):
    scene = Scene(step_s=100.0, stop_s=0.1) if stopped else Scene(step_s=0.05)
    scene.stop.requested = stopped
    scene.gather()
    scene.sender.send(GRANT, policy_version=5)
    setting = "deadlines.stop_s" if stopped else "deadlines.step_s"
    message = rf"row 6 of the replay is not done after 0\.05 s; expected .*raise {setting}$"
    with pytest.raises(TransportError, match=message):
        scene.sender.wait_until_committed()
