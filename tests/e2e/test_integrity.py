"""The learner's real loop samples at full speed while collectors are killed mid-write: no row is ever torn, stale, out of
order or unwritten, and the learner keeps one thread."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from collector_proc.simulators.pendulum.simulator import pendulum_frame
from launcher.run_folder import create_run_folder
from learner_proc import learn, startup
from learner_proc.numbers import Numbers
from shared.compose import compose, save_settings
from shared.files import write_json
from shared.geometry import Geometry
from shared.lifetime import StopFlag
from shared.logs import configure
from shared.metrics import SKIPPED
from shared.model.policy import Policy
from shared.progress import Progress
from shared.run_folder import make_socket_dir, read_run, remove_socket_dir
from tests.processes import mapped_shared_memory

SECONDS = 25.0
MIN_KILLS, MIN_COMMITS, MIN_WINDOWS = 3, 200, 10_000
GRACE_S = 180.0  # more time for a busy machine; the test is skipped if that is not enough
LOUD = 0xAB
OVERRIDES = [
    "env.num_envs=64",
    "collector.frames_per_batch=512",
    "collector.init_random_frames=2048",
    "collector.eval_envs=4",
    "replay_buffer.buffer_size=8192",
    "replay_buffer.batch_size=1024",
    "replay_buffer.batch_length=16",
    "replay_buffer.checksum=true",
    "optimization.replay_ratio=null",
    "optimization.total_optim_steps=100000000",
    "optimization.publish_every=50",
    "optimization.compile.enabled=false",
    "checkpoint.every_s=100000",
]


class Killer:
    """Starts collectors and kills each at a random instant, often in the middle of a chunk."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._source = run_dir, random.Random(0)
        self.kills = self.incarnation = -1
        self.shared_memory: set[str] = set()  # files in /dev/shm that a collector mapped when it was killed
        self.child: subprocess.Popen | None = None
        self.respawn()

    def respawn(self) -> None:
        self.end()
        self.kills += 1
        self.incarnation += 1
        script = Path(__file__).with_name("stamped_collector.py")
        command = [sys.executable, str(script), "--run-dir", str(self._run_dir), "--incarnation", str(self.incarnation)]
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]))
        self.child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        self.streaming_until: float | None = None

    def end(self) -> None:
        if self.child is not None:
            self.shared_memory |= mapped_shared_memory(self.child.pid)
            self.child.kill()
            self.child.wait()

    def poll(self, *, streaming: bool) -> None:
        """Kill the present incarnation between 0.05 and 3 s after it began to stream."""
        now = time.monotonic()
        if streaming and self.streaming_until is None:
            self.streaming_until = now + self._source.choice([0.05, 0.3, 1.0, 3.0]) * self._source.random()
        assert self.child is not None
        if self.streaming_until is not None and now > self.streaming_until:
            self.respawn()
        assert self.child.poll() is None, "the collector ended by itself"


class Checker:
    """Stands where the gradient step stands and checks every sampled window against what the commits said."""

    def __init__(self, spec, settings, *, device) -> None:
        self.spec, self.policy = spec, Policy(spec, settings.networks)
        self.world_model = self.critic = None
        self.windows = self.steps = 0
        self.threads = 0

    def __call__(self, batch) -> Numbers:
        learner, table = TEST["learner"], TEST["table"]
        stamp = batch["obs", "stamp"].long()  # (B, L, 3)
        incarnation, env, tick = stamp.unbind(-1)
        # each sampled row is one that was committed: its stamp names the ring row that must hold it
        row = table.row_of(incarnation, tick)
        assert (row >= 0).all(), "a row that was never committed"
        assert torch.equal(row.diff(dim=1) % table.capacity, torch.ones_like(row[:, 1:])), (
            "out of order, or stale beside fresh"
        )
        assert (env == env[:, :1]).all() and ((env >= 0) & (env < 64)).all(), "rows of two environments"
        position = (row - learner._link.replay.first) % table.capacity
        assert (position < learner._link.replay.num_rows).all(), "a row out of the sampler's reach"
        new = incarnation.diff(dim=1) != 0
        assert (tick.diff(dim=1)[~new] == 1).all() and (tick[:, 1:][new] == 0).all()
        assert batch["is_first"][:, 1:][new].all(), "an incarnation begins with a reset"
        self._check_dynamics(batch)
        assert (batch["policy_version"] <= learner._publisher.version).all()
        self.windows += len(row)
        self.steps += 1
        self.threads = max(self.threads, threading.active_count())
        TEST["killer"].poll(streaming=learner._link.streaming)
        now, killer = time.monotonic(), TEST["killer"]
        enough = killer.kills >= MIN_KILLS and table.commits > MIN_COMMITS and self.windows > MIN_WINDOWS
        if now > TEST["end"] and (enough or now > TEST["end"] + GRACE_S):
            TEST["stop"].requested = True
        return Numbers((SKIPPED,), torch.zeros(1))

    @staticmethod
    def _check_dynamics(batch) -> None:
        """Observation, action and reward of every row fit the row before: a torn row would not."""
        policy = batch["obs", "policy"]
        state = torch.stack([torch.atan2(policy[..., 1], policy[..., 0]), policy[..., 2] * 8.0], -1)[:, :-1]
        reward, action = torch.zeros(state.shape[:2]), batch["action"][:, 1:]
        for _ in range(2):
            state, step_reward = pendulum_frame(state, action.squeeze(-1))
            reward += step_reward
        expected = torch.stack([state[..., 0].cos(), state[..., 0].sin(), state[..., 1] / 8.0], -1)
        moved = ~batch["is_first"][:, 1:]
        torch.testing.assert_close(policy[:, 1:][moved], expected[moved], rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(batch["reward"][:, 1:][moved], reward[moved], rtol=1e-4, atol=2e-4)

    def observe_statistics(self, obs) -> None:
        return None

    def state_dict(self) -> dict:
        return {}

    def parameter_counts(self) -> dict:
        return {}


class NoDiagnostics:
    metrics = ()

    def __init__(self, *args, **kwargs) -> None:
        """There is no model to diagnose."""

    def __call__(self, batch) -> Numbers:
        return Numbers((), torch.zeros(0))


class Table:
    """(incarnation, tick) -> ring row, filled by commits alone; overwritten rows are forgotten."""

    def __init__(self, capacity: int, ticks: int) -> None:
        self.capacity, self.ticks = capacity, ticks
        self.commits = 0
        self._row: dict[int, int] = {}
        self._holder: dict[int, int] = {}
        self._next_tick: dict[int, int] = {}

    def commit(self, incarnation: int, row: int) -> None:
        first = self._next_tick.get(incarnation, 0)
        for k in range(self.ticks):
            key = incarnation * 10**7 + first + k
            self._row.pop(self._holder.get(row + k, -1), None)
            self._row[key], self._holder[row + k] = row + k, key
        self._next_tick[incarnation] = first + self.ticks
        self.commits += 1

    def row_of(self, incarnation: torch.Tensor, tick: torch.Tensor) -> torch.Tensor:
        keys = (incarnation * 10**7 + tick).view(-1).tolist()
        return torch.tensor([self._row.get(key, -1) for key in keys]).view(incarnation.shape)


TEST: dict = {}


@pytest.fixture
def run_dir(tmp_path):
    lock = create_run_folder(tmp_path / "run")
    socket_dir = make_socket_dir()
    write_json(lock.folder.run_json, {"run_id": "integrity", "socket_dir": str(socket_dir)})
    yield lock.folder.path
    remove_socket_dir(socket_dir)
    lock.release()


def test_no_sampled_window_is_ever_torn_stale_or_unwritten_while_collectors_are_killed(
    run_dir, monkeypatch, record_property
):
    settings = compose("quickstart", OVERRIDES)
    save_settings(settings, run_dir / "config.yaml")
    geometry = Geometry.of(settings)
    before = mapped_shared_memory(os.getpid())
    num_threads = threading.active_count()
    made: list[Checker] = []

    def make(*args, **kwargs):
        made.append(Checker(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(startup, "GradientStep", make)
    monkeypatch.setattr(learn, "Diagnostics", NoDiagnostics)
    monkeypatch.setattr(learn, "ReturnCheck", NoDiagnostics)
    loud = startup.create_memfd_slab

    def create_loud(num_bytes):
        slab, fd = loud(num_bytes)
        slab.fill_(LOUD)  # unwritten memory must show if it is read
        return slab, fd

    monkeypatch.setattr(startup, "create_memfd_slab", create_loud)
    stop = StopFlag()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learner = learn.Learner(
        settings, geometry, read_run(run_dir), run_dir=run_dir, device=torch.device("cpu"), resume=False,
        progress=Progress.create(run_dir / "learner.progress"), stop=stop, log=configure(run_dir, "learner"),
    )  # fmt: skip
    table = Table(geometry.capacity, geometry.ticks_per_chunk)
    take = learner._commit

    def recording(commit):
        table.commit(learner._link.incarnation, commit.row)
        take(commit)

    monkeypatch.setattr(learner, "_commit", recording)
    killer = Killer(run_dir)
    TEST.update(learner=learner, table=table, killer=killer, stop=stop, end=time.monotonic() + SECONDS)
    try:
        learner.run()
    finally:
        killer.end()
        torch.set_num_threads(threads)
    (checker,) = made
    assert checker.threads == num_threads, "the learner's loop starts no Python thread"
    assert not killer.shared_memory, "a collector maps no named shared memory, which a kill would leave behind"
    assert mapped_shared_memory(os.getpid()) <= before
    record_property("kills_commits_windows", (killer.kills, table.commits, checker.windows))
    counts = f"{killer.kills} kills, {table.commits} commits, {checker.windows} windows"
    sys.stderr.write(counts + "\n")
    if killer.kills < MIN_KILLS or table.commits <= MIN_COMMITS or checker.windows <= MIN_WINDOWS:
        pytest.skip(f"pace not reached: {counts} in {SECONDS + GRACE_S:.0f} s; each of them was right")
