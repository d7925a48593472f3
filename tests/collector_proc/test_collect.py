"""The loop beside copies that take their time: a commit speaks of rows that are there, in the order of the grants."""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from collector_proc import collect
from collector_proc.collect import Collector
from collector_proc.simulators.base import Arrival
from shared.config import Geometry, NetworkSettings, Settings
from shared.errors import SettingError, SimulatorError, TransportError
from shared.handover import Channel, Disconnected, create_memfd_slab
from shared.lifetime import StopFlag
from shared.memory import Memory, own_rss_bytes
from shared.messages import Commit, Grant, Welcome
from shared.progress import HELD_GB, Progress
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.late_copier import LateCopier

E, K, CAPACITY = 2, 3, 12
SPEC = StreamSpec(E, {"policy": ObsSpec((1,), "float32")}, 1)
ROWS = [9, 3, 0, 6]  # where the grants let the first chunks go, out of order so that a mix-up shows


class Ticks:
    """A simulator whose observation is 1000 * environment + tick; all episodes last three ticks and pay 1 a step.

    before: called with the number of the tick that is about to happen.
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
        """Nothing to free."""

    def _arrival(self) -> Arrival:
        first, last = (torch.full((E,), self.tick % 3 == phase) for phase in (0, 2))
        reward = torch.where(first, 0.0, 1.0)
        obs = {"policy": (1000.0 * torch.arange(E) + self.tick)[:, None]}
        return Arrival(obs, reward, first, last, torch.zeros_like(last))


class Steps:
    """A progress file that nobody reads. within: called whenever the collector says that it moves."""

    def __init__(self) -> None:
        self.within: Callable[[], None] = lambda: None

    def advance(self) -> None:
        self.within()

    def phase(self, name: str) -> None:
        """Nobody asks."""

    def status(self, numbers: dict) -> None:
        """Keep the last."""
        self.numbers = numbers


class Scene:
    """A collector with its learner's end in the test's hands: welcome and grants wait in the socket."""

    def __init__(self, monkeypatch, folder, before: Callable[[int], None], *, late: bool = True, **settings) -> None:
        self.copier, self.progress, self.stop = LateCopier(), Steps(), StopFlag()
        if late:
            monkeypatch.setattr(collect, "copier_between", lambda device, target: self.copier)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.learner = Channel(theirs)
        layout = plan_layout(SPEC, CAPACITY)
        slab, descriptor = create_memfd_slab(layout.num_bytes)
        self.ring = ring_views(slab, layout)
        welcome = Welcome("memfd", layout.num_bytes, CAPACITY, "", [], 0, random_frames=10_000, agent_steps=0)
        self.learner.send(welcome, (descriptor,))
        for seq, row in enumerate(ROWS):
            self.learner.send(Grant(seq, row, 0))
        self.collector = Collector(
            _settings(**settings),
            Geometry(E, K, CAPACITY, prefill_chunks=1, num_sequences=1, sequence_length=2),
            Ticks(before),
            Channel(ours),
            socket_dir=str(folder),
            run_id="run",
            incarnation=0,
            seed=0,
            device=torch.device("cpu"),
            progress=cast(Progress, self.progress),
            stop=self.stop,
        )
        self.copier.num_host_waits = self.copier.num_blocked_streams = 0  # the self-test waits, and may
        self._commits: list[Commit] = []

    def commits(self) -> list[Commit]:
        """Every commit so far."""
        with contextlib.suppress(Disconnected):  # the collector has ended
            while (received := self.learner.receive()) is not None:
                if isinstance(received[0], Commit):
                    self._commits.append(received[0])
        return self._commits

    def ticks_in(self, row: int) -> list[float]:
        """The ticks that the chunk at a ring row holds, read from environment 0; environment 1 must agree."""
        chunk = self.ring["obs", "policy"][row : row + K, :, 0]
        assert torch.equal(chunk[:, 1], chunk[:, 0] + 1000)
        return chunk[:, 0].tolist()


def _settings(**values: Any) -> Settings:
    settings = Settings(networks=NetworkSettings(state_dim=2, rssm_hidden_dim=4, hidden_dim=4))
    settings.collector.eval_envs = 0
    settings.collector.mode = values.pop("mode", "async")
    settings.collector.max_rss_gb = values.pop("max_rss_gb", None)
    for name, seconds in values.items():
        setattr(settings.deadlines, name, seconds)
    return settings


def test_a_commit_is_sent_in_the_first_tick_after_its_rows_have_arrived_and_not_before(monkeypatch, tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = len(scene.commits())
        if tick == 4:
            scene.copier.finish()
        scene.stop.requested = tick == 5

    scene = Scene(monkeypatch, tmp_path, before)
    scene.collector.run()
    assert seen == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1}  # ticks 0 to 2 fill the chunk, which is under way until tick 4
    (commit,) = scene.commits()
    assert (commit.seq, commit.row, commit.agent_steps, commit.env_frames) == (0, ROWS[0], 2 * E, 4 * E)
    assert struct.unpack("<2f", commit.returns) == (2.0, 2.0) and struct.unpack("<2i", commit.lengths) == (2, 2)
    assert commit.num_episodes == 2
    assert scene.copier.num_host_waits == 0, "nothing was read before it had arrived"


def test_rows_gathered_while_a_chunk_is_under_way_do_not_get_into_it(monkeypatch, tmp_path):
    def before(tick: int) -> None:
        if tick == 5:  # ticks 3 and 4 are gathered by now
            scene.copier.finish()
        scene.stop.requested = tick == 7

    scene = Scene(monkeypatch, tmp_path, before)
    scene.progress.within = lambda: scene.copier.finish() if scene.stop.requested else None
    scene.collector.run()
    assert scene.ticks_in(ROWS[0]) == [0.0, 1.0, 2.0] and scene.ticks_in(ROWS[1]) == [3.0, 4.0, 5.0]
    assert scene.copier.num_blocked_streams == 0


def test_a_full_chunk_waits_for_the_one_under_way_and_commits_keep_the_order_of_the_grants(monkeypatch, tmp_path):
    most, idle = 0, 0

    def before(tick: int) -> None:
        nonlocal idle
        idle, scene.stop.requested = 0, tick == 12

    def within() -> None:
        nonlocal most, idle
        idle, most = idle + 1, max(most, scene.copier.num_pending)
        if idle == 4:  # no tick for a while: the collector waits
            scene.copier.finish()

    scene = Scene(monkeypatch, tmp_path, before)
    scene.progress.within = within
    scene.collector.run()
    assert [(commit.seq, commit.row) for commit in scene.commits()] == list(enumerate(ROWS))
    assert [commit.agent_steps for commit in scene.commits()] == [2 * E] * 4, "a third of the rows are resets"
    assert [scene.ticks_in(row) for row in ROWS] == [[3.0 * n, 3.0 * n + 1, 3.0 * n + 2] for n in range(4)]
    assert most == 2, "the rows and the numbers of one chunk"
    assert scene.copier.num_host_waits == 0


def test_a_stop_with_a_chunk_under_way_still_commits_it(monkeypatch, tmp_path):
    polls = 0

    def before(tick: int) -> None:
        scene.stop.requested = tick == 4

    def within() -> None:
        nonlocal polls
        polls += scene.stop.requested
        if polls == 3:
            assert not scene.commits()
            scene.copier.finish()

    scene = Scene(monkeypatch, tmp_path, before)
    scene.progress.within = within
    scene.collector.run()
    assert [commit.seq for commit in scene.commits()] == [0] and scene.ticks_in(ROWS[0]) == [0.0, 1.0, 2.0]


def test_a_learner_that_goes_with_a_chunk_under_way_ends_the_loop(monkeypatch, tmp_path):
    def before(tick: int) -> None:
        if tick == 4:
            scene.learner.close()

    scene = Scene(monkeypatch, tmp_path, before, step_s=10.0)
    scene.collector.run()
    assert scene.copier.num_pending == 2, "the copies of the chunk never arrived"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_chunk_that_never_arrives_is_named(monkeypatch, tmp_path, stopped):
    def before(tick: int) -> None:
        scene.stop.requested = stopped and tick == 4

    limits: dict[str, Any] = {"step_s": 100.0, "stop_s": 0.2} if stopped else {"step_s": 0.1}
    scene = Scene(monkeypatch, tmp_path, before, **limits)
    with pytest.raises(TransportError, match=f"row {ROWS[0]} "):
        scene.collector.run()


def test_in_lockstep_no_tick_happens_while_a_chunk_is_under_way(monkeypatch, tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = (len(scene.commits()), scene.copier.num_pending)
        scene.stop.requested = tick == 7

    scene = Scene(monkeypatch, tmp_path, before, mode="lockstep")
    scene.progress.within = scene.copier.finish
    scene.collector.run()
    assert [seen[tick] for tick in (2, 3, 5, 6)] == [(0, 0), (1, 0), (1, 0), (2, 0)]
    assert [commit.row for commit in scene.commits()] == ROWS[:2]


def test_on_a_cpu_a_chunk_is_committed_at_once(monkeypatch, tmp_path):
    seen = {}

    def before(tick: int) -> None:
        seen[tick] = len(scene.commits())
        scene.stop.requested = tick == 6

    scene = Scene(monkeypatch, tmp_path, before, late=False)
    scene.collector.run()
    assert seen == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2}
    assert scene.ticks_in(ROWS[1]) == [3.0, 4.0, 5.0]


class Growing:
    """A meter that reads half a gigabyte more with every chunk that is full."""

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks

    def read(self, *, anew: bool = False) -> Memory:
        return Memory(500_000_000 * ((self._ticks.tick + 1) // K), 7_000_000, 9_000_000)


def grow(monkeypatch, folder, max_rss_gb: float | None, last_tick: int) -> Scene:
    def before(tick: int) -> None:
        scene.stop.requested = tick == last_tick

    scene = Scene(monkeypatch, folder, before, late=False, max_rss_gb=max_rss_gb)
    monkeypatch.setattr(scene.collector, "_meter", Growing(cast(Ticks, scene.collector._simulator)))
    return scene


def test_a_collector_that_grew_too_large_ends_when_its_chunk_is_committed(monkeypatch, tmp_path):
    scene = grow(monkeypatch, tmp_path, max_rss_gb=1.4, last_tick=12)
    scene.collector.run()
    assert scene.collector.outgrown and [commit.row for commit in scene.commits()] == ROWS[:3]
    assert scene.progress.numbers[HELD_GB] == 1.5, "launch tells it"
    assert [scene.ticks_in(row)[-1] for row in ROWS[:3]] == [2.0, 5.0, 8.0], "no row is lost"
    assert [commit.rss_bytes for commit in scene.commits()] == [500_000_000, 1_000_000_000, 1_500_000_000]
    assert {(commit.gpu_bytes, commit.device_bytes) for commit in scene.commits()} == {(7_000_000, 9_000_000)}


def test_without_a_limit_a_collector_may_grow(monkeypatch, tmp_path):
    scene = grow(monkeypatch, tmp_path, max_rss_gb=None, last_tick=12)
    scene.collector.run()
    assert not scene.collector.outgrown and len(scene.commits()) == 4


@pytest.mark.parametrize(("incarnation", "error"), [(0, SettingError), (3, SimulatorError)])
def test_a_limit_below_what_a_collector_needs_is_refused_and_not_restarted_into(
    monkeypatch, tmp_path, incarnation, error
):
    scene = grow(monkeypatch, tmp_path, max_rss_gb=0.4, last_tick=12)
    monkeypatch.setattr(scene.collector, "_incarnation", incarnation)
    with pytest.raises(error, match=r"max_rss_gb=0.4 .* 0\.50 GB .*wanted .*; set collector.max_rss_gb=1.0"):
        scene.collector.run()


def test_the_first_chunks_memory_is_measured_behind_its_work_however_fast_it_was(monkeypatch, tmp_path):
    lost = []

    def before(tick: int) -> None:
        # not from the heap, which may have pages left over
        page = mmap.mmap(-1, 100_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(100):
            page.write(b"\1" * 1_000_000)
        lost.append(page)
        scene.stop.requested = tick == 12

    limit = own_rss_bytes() / 1e9 + 0.15
    scene = Scene(monkeypatch, tmp_path, before, late=False, max_rss_gb=limit)
    with pytest.raises(SettingError, match=r"max_rss_gb=.* after one chunk"):
        scene.collector.run()
    assert len(lost) == K - 1, "what was measured is of the first chunk"
