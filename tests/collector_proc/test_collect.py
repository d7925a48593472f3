"""The collector's loop with copies that take their time: what is committed, when, and in which order."""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from collector_proc.collect import Collector
from collector_proc.connect import open_replay
from collector_proc.simulators.base import Arrival
from learner_proc.publisher import Publisher
from shared.config import NetworkSettings, Settings
from shared.errors import SettingError, SimulatorError
from shared.handover import Channel, Disconnected, create_memfd_slab
from shared.lifetime import StopFlag
from shared.memory import Memory, MemoryMeter, own_rss_bytes
from shared.messages import Commit, Grant, Welcome
from shared.model.policy import Policy
from shared.socket_folder import obtain_secret
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.fake_process import FakeProgress, fake_process
from tests.fakes.late_copier import LateCopier

E, K, CAPACITY = 2, 3, 12
CPU = torch.device("cpu")
SPEC = StreamSpec(E, {"policy": ObsSpec((1,), "float32")}, 1)
ROWS = [9, 3, 0, 6]  # the granted rows; they are out of order, so that a chunk in the wrong place shows


class TickCounter:
    """A simulator whose observation is 1000 * environment + tick.

    Its episodes last three ticks; the reward is 1 per agent step.

    before: called before each tick with the tick's number.
    """

    spec, device, frames_per_step, num_diverged = SPEC, "cpu", 2, 0

    def __init__(self, before: Callable[[int], None]) -> None:
        self._before, self.tick = before, 0

    def reset(self) -> Arrival:
        return self._arrival()

    def step(self, action: torch.Tensor) -> Arrival:
        assert action.shape == (E, 1)
        self.tick += 1
        self._before(self.tick)
        return self._arrival()

    def close(self) -> None:
        """Nothing is to be freed."""

    def _arrival(self) -> Arrival:
        first, last = (torch.full((E,), self.tick % 3 == phase) for phase in (0, 2))
        reward = torch.where(first, 0.0, 1.0)
        obs = {"policy": (1000.0 * torch.arange(E) + self.tick)[:, None]}
        return Arrival(obs, reward, first, last, torch.zeros_like(last))


class GrowingMeter:
    """A memory meter that reads half a gigabyte more after every full chunk."""

    def __init__(self, simulator: TickCounter) -> None:
        self._simulator = simulator

    def read(self, **kwargs) -> Memory:
        return Memory(500_000_000 * ((self._simulator.tick + 1) // K), 7_000_000, 9_000_000)


class Scene:
    """A collector whose learner is played by the test. The welcome and the grants already wait in the socket.

    late: chunks are copied by a LateCopier. growing: the memory is read from a GrowingMeter.
    """

    def __init__(
        self,
        folder,
        before: Callable[[int], None],
        *,
        late: bool = True,
        growing: bool = False,
        incarnation: int = 0,
        agent_steps: int = 0,
        random_frames: int = 10_000,
        grant_version: int = 0,
        **settings,
    ) -> None:
        self.copier, self.progress, self.stop = LateCopier(), FakeProgress(), StopFlag()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.learner = Channel(theirs)
        layout = plan_layout(SPEC, CAPACITY)
        slab, descriptor = create_memfd_slab(layout.num_bytes)
        self.ring = ring_views(slab, layout)
        secret = obtain_secret(folder)
        welcome = Welcome(
            secret, "memfd", layout.num_bytes, CAPACITY, "", [], 0, random_frames=random_frames, agent_steps=agent_steps
        )
        self.learner.send(welcome, (descriptor,))
        for seq, row in enumerate(ROWS):
            self.learner.send(Grant(seq, row, grant_version))
        chosen, self.simulator = _settings(**settings), TickCounter(before)
        process = fake_process(chosen, self.progress, self.stop, socket_dir=str(folder))
        self.progress.on_advance = self.copier.finish  # the self-test waits for its copies
        connection = open_replay(
            Channel(ours),
            SPEC,
            chosen.deadlines,
            run_id="run",
            secret=secret,
            incarnation=incarnation,
            device=CPU,
            alive=process.alive,
        )
        self.collector = Collector(
            process,
            self.simulator,
            connection,
            ticks=K,
            incarnation=incarnation,
            seed=0,
            device=CPU,
            copier=self.copier if late else None,
            meter=cast(MemoryMeter, GrowingMeter(self.simulator)) if growing else None,
        )
        self.progress.on_advance = lambda: None
        self.copier.num_host_waits = self.copier.num_blocked_streams = 0
        self._commits: list[Commit] = []

    def commits(self) -> list[Commit]:
        """Return every commit so far."""
        with contextlib.suppress(Disconnected):  # the collector has ended
            while (received := self.learner.receive()) is not None:
                if isinstance(received[0], Commit):
                    self._commits.append(received[0])
        return self._commits

    def ticks_in(self, row: int) -> list[float]:
        """Return the ticks of the chunk at a ring row, read from environment 0; environment 1 must agree."""
        chunk = self.ring["obs", "policy"][row : row + K, :, 0]
        assert torch.equal(chunk[:, 1], chunk[:, 0] + 1000)
        return chunk[:, 0].tolist()


def _settings(**values: Any) -> Settings:
    settings = Settings(networks=NetworkSettings(state_dim=2, rssm_hidden_dim=4, hidden_dim=4))
    settings.collector.eval_envs = 0
    settings.collector.mode = values.pop("mode", "async")
    settings.collector.max_rss_gb = values.pop("max_rss_gb", None)
    settings.collector.recycle_after_hours = values.pop("recycle_after_hours", None)
    for name, seconds in values.items():
        setattr(settings.deadlines, name, seconds)
    return settings


def test_a_chunk_is_committed_in_the_first_tick_after_its_copy_is_done_and_not_before(tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = len(scene.commits())
        if tick == 4:
            scene.copier.finish()
        scene.stop.requested = tick == 5

    scene = Scene(tmp_path, before)
    scene.collector.run()
    assert seen == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1}  # ticks 0 to 2 fill the chunk; its copy is done at tick 4
    (commit,) = scene.commits()
    assert (commit.seq, commit.row, commit.agent_steps, commit.env_frames) == (0, ROWS[0], 2 * E, 4 * E)
    assert struct.unpack("<2f", commit.returns) == (2.0, 2.0) and struct.unpack("<2i", commit.lengths) == (2, 2)
    assert commit.num_episodes == 2
    assert scene.copier.num_host_waits == 0, "the host never waited for a copy"


def test_rows_that_are_gathered_during_a_copy_do_not_change_the_chunk_being_copied(tmp_path):
    def before(tick: int) -> None:
        if tick == 5:  # ticks 3 and 4 are gathered by now
            scene.copier.finish()
        scene.stop.requested = tick == 7

    scene = Scene(tmp_path, before)
    scene.progress.on_advance = lambda: scene.copier.finish() if scene.stop.requested else None
    scene.collector.run()
    assert scene.ticks_in(ROWS[0]) == [0.0, 1.0, 2.0] and scene.ticks_in(ROWS[1]) == [3.0, 4.0, 5.0]
    assert scene.copier.num_blocked_streams == 0


def test_a_full_chunk_waits_for_the_previous_copy_and_commits_have_the_order_of_the_grants(tmp_path):
    most, idle = 0, 0

    def before(tick: int) -> None:
        nonlocal idle
        idle, scene.stop.requested = 0, tick == 12

    def on_advance() -> None:
        nonlocal most, idle
        idle, most = idle + 1, max(most, scene.copier.num_pending)
        if idle == 4:  # there was no tick for a while, so the collector waits
            scene.copier.finish()

    scene = Scene(tmp_path, before)
    scene.progress.on_advance = on_advance
    scene.collector.run()
    assert [(commit.seq, commit.row) for commit in scene.commits()] == list(enumerate(ROWS))
    assert [commit.agent_steps for commit in scene.commits()] == [2 * E] * 4, "a third of the rows are resets"
    assert [scene.ticks_in(row) for row in ROWS] == [[3.0 * n, 3.0 * n + 1, 3.0 * n + 2] for n in range(4)]
    assert most == 2, "one copy of the rows and one of the episode numbers"
    assert scene.copier.num_host_waits == 0


def test_a_chunk_whose_copy_is_running_at_a_stop_is_still_committed(tmp_path):
    polls = 0

    def before(tick: int) -> None:
        scene.stop.requested = tick == 4

    def on_advance() -> None:
        nonlocal polls
        polls += scene.stop.requested
        if polls == 3:
            assert not scene.commits()
            scene.copier.finish()

    scene = Scene(tmp_path, before)
    scene.progress.on_advance = on_advance
    scene.collector.run()
    assert [commit.seq for commit in scene.commits()] == [0] and scene.ticks_in(ROWS[0]) == [0.0, 1.0, 2.0]


def test_the_loop_ends_if_the_learner_ends_while_a_copy_is_running(tmp_path):
    def before(tick: int) -> None:
        if tick == 4:
            scene.learner.close()

    scene = Scene(tmp_path, before, step_s=10.0)
    scene.collector.run()
    assert scene.copier.num_pending == 2, "the copies of the rows and of the episode numbers"


def test_the_loop_ends_in_the_tick_in_which_the_learner_ends(tmp_path):
    """The learner waits a moment for it, so that the replay is unmapped before its memory is freed."""

    def before(tick: int) -> None:
        if tick == 1:
            scene.learner.close()

    scene = Scene(tmp_path, before, late=False)
    scene.collector.run()
    assert scene.simulator.tick <= 2


def test_in_lockstep_no_tick_happens_while_a_chunk_is_uncommitted(tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = (len(scene.commits()), scene.copier.num_pending)
        scene.stop.requested = tick == 7

    scene = Scene(tmp_path, before, mode="lockstep")
    scene.progress.on_advance = scene.copier.finish
    scene.collector.run()
    assert [seen[tick] for tick in (2, 3, 5, 6)] == [(0, 0), (1, 0), (1, 0), (2, 0)]
    assert [commit.row for commit in scene.commits()] == ROWS[:2]


def test_on_a_cpu_a_chunk_is_committed_at_once(tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = len(scene.commits())
        scene.stop.requested = tick == 6

    scene = Scene(tmp_path, before, late=False)
    scene.collector.run()
    assert seen == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2}
    assert scene.ticks_in(ROWS[1]) == [3.0, 4.0, 5.0]


def make_growing(folder, *, max_rss_gb: float | None, last_tick: int, incarnation: int = 0) -> Scene:
    """Return a scene whose collector holds 0.5 GB more after every chunk, and which stops at `last_tick`."""

    def before(tick: int) -> None:
        scene.stop.requested = tick == last_tick

    scene = Scene(folder, before, late=False, growing=True, incarnation=incarnation, max_rss_gb=max_rss_gb)
    return scene


def test_a_collector_that_exceeds_the_memory_limit_commits_its_chunk_and_ends(tmp_path):
    scene = make_growing(tmp_path, max_rss_gb=1.4, last_tick=12)
    scene.collector.run()
    assert scene.collector.exceeded_memory_limit and [commit.row for commit in scene.commits()] == ROWS[:3]
    assert scene.progress.last_status is not None and scene.progress.last_status.rss_gb == 1.5, "launch shows it"
    assert [scene.ticks_in(row)[-1] for row in ROWS[:3]] == [2.0, 5.0, 8.0], "no row is lost"
    assert [commit.rss_bytes for commit in scene.commits()] == [500_000_000, 1_000_000_000, 1_500_000_000]
    assert {(commit.gpu_bytes, commit.device_bytes) for commit in scene.commits()} == {(7_000_000, 9_000_000)}


@pytest.mark.parametrize(("hours", "num_chunks"), [(1e-9, 1), (1000.0, 4), (None, 4)])
def test_a_collector_that_reached_its_age_commits_its_chunk_and_ends(tmp_path, hours, num_chunks):
    scene = Scene(
        tmp_path, lambda tick: setattr(scene.stop, "requested", tick == 12), late=False, recycle_after_hours=hours
    )
    scene.collector.run()
    assert scene.collector.is_recycled == (num_chunks == 1)
    assert len(scene.commits()) == scene.collector.num_chunks == num_chunks


def test_without_a_memory_limit_a_collector_may_grow(tmp_path):
    scene = make_growing(tmp_path, max_rss_gb=None, last_tick=12)
    scene.collector.run()
    assert not scene.collector.exceeded_memory_limit and len(scene.commits()) == 4


@pytest.mark.parametrize(("incarnation", "error"), [(0, SettingError), (3, SimulatorError)])
def test_a_memory_limit_that_the_first_chunk_exceeds_is_an_error(tmp_path, incarnation, error):
    scene = make_growing(tmp_path, max_rss_gb=0.4, last_tick=12, incarnation=incarnation)
    with pytest.raises(error, match=r"max_rss_gb=0.4 .* 0\.50 GB .*expected .*; set collector.max_rss_gb=1.0"):
        scene.collector.run()


def test_the_first_chunks_memory_is_measured_after_its_work_even_if_it_took_less_than_a_second(tmp_path):
    held = []

    def before(tick: int) -> None:
        # map new pages: memory from the heap may be resident already
        page = mmap.mmap(-1, 100_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(100):
            page.write(b"\1" * 1_000_000)
        held.append(page)
        scene.stop.requested = tick == 12

    limit = own_rss_bytes() / 1e9 + 0.15
    scene = Scene(tmp_path, before, late=False, max_rss_gb=limit)
    with pytest.raises(SettingError, match=r"max_rss_gb=.* after one chunk"):
        scene.collector.run()
    assert len(held) == K - 1, "the error came after the first chunk"


def test_the_count_of_agent_steps_continues_that_of_the_run(tmp_path):
    def before(tick: int) -> None:
        scene.stop.requested = tick == 3

    scene = Scene(tmp_path, before, late=False, agent_steps=1000)
    scene.collector.run()
    assert scene.collector.agent_steps == 1000 + 2 * E
    assert scene.progress.last_status is not None and scene.progress.last_status.agent_steps == 1000 + 2 * E


def make_publisher(folder) -> Publisher:
    networks = NetworkSettings(state_dim=2, rssm_hidden_dim=4, hidden_dim=4)
    return Publisher(Policy(SPEC, networks), socket_dir=folder, run_id="run")


def test_rows_have_the_version_that_chose_their_action_and_a_reset_row_has_no_action(tmp_path):
    def before(tick: int) -> None:
        scene.stop.requested = tick == 6

    publisher = make_publisher(tmp_path)
    publisher.publish(step=0)
    scene = Scene(tmp_path, before, late=False, mode="lockstep", random_frames=2 * E, grant_version=1)
    scene.progress.on_advance = publisher.republish  # the first message is lost if the subscription is not complete
    scene.collector.run()
    rows = torch.cat([scene.ring["policy_version"][row : row + K] for row in ROWS[:2]])
    assert rows.tolist() == [0, 0, 0, 1, 1, 1], "the reset and two random ticks, then the policy"
    action = torch.cat([scene.ring["action"][row : row + K] for row in ROWS[:2]])
    assert (action.abs().sum((1, 2)) > 0).tolist() == [False, True, True] * 2
    publisher.close()


def test_a_collector_without_random_ticks_makes_no_tick_before_it_has_weights_and_then_adopts_newer_ones(tmp_path):
    publisher, calls = make_publisher(tmp_path), 0

    def on_advance() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            assert scene.simulator.tick == 0, "it still waits for the first weights"
            publisher.publish(step=0)
        if calls > 5:
            publisher.republish()

    def before(tick: int) -> None:
        if tick == 1:
            publisher.publish(step=1)
        time.sleep(0.02)  # lets ZeroMQ deliver
        scene.stop.requested = tick == 9

    scene = Scene(tmp_path, before, late=False, random_frames=0)
    scene.progress.on_advance = on_advance
    scene.collector.run()
    versions = torch.cat([scene.ring["policy_version"][row : row + K] for row in ROWS[:3]]).tolist()
    assert versions[1] >= 1 and versions[-1] == 2
    publisher.close()
