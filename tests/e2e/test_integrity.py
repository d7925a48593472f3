"""The learner's real loop samples at full speed while collectors are killed in the middle of their writes.

No sampled row is ever torn, stale, out of order or unwritten, and the learner has one Python thread.
"""

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
from tensordict import TensorDict

from collector_proc.simulators.pendulum.simulator import pendulum_frame
from launcher.run_folder import create_run_folder
from learner_proc import measurements, startup
from learner_proc.numbers import Numbers
from learner_proc.waiting import WaitingLearner
from shared.compose import compose, save_settings
from shared.config import Settings
from shared.files import write_json
from shared.geometry import Geometry
from shared.lifetime import StopFlag
from shared.logs import configure
from shared.metrics import METRICS, NAN_SKIPS
from shared.model.policy import Policy
from shared.process import Process
from shared.progress import Progress
from shared.run_folder import read_run
from shared.socket_folder import make_socket_dir, remove_socket_dir
from shared.stream import StreamSpec
from tests.processes import mapped_shared_memory

SECONDS = 25.0
MIN_KILLS, MIN_COMMITS, MIN_WINDOWS = 3, 100, 10_000
GRACE_S = 180.0  # more time for a busy machine; the test is skipped if that is not enough
LOUD = 0xAB
MEASURED_GROUPS = ("loss", "model", "behavior", "gradient")
STEP_METRICS = tuple(m for m in METRICS.values() if m.group in MEASURED_GROUPS and m != NAN_SKIPS)
NUM_ENVS = 64
OVERRIDES = [
    f"env.num_envs={NUM_ENVS}",
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
    """Starts collectors and kills each one at a random moment, often in the middle of a chunk."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._source = run_dir, random.Random(0)
        self.kills, self.incarnation = 0, 0
        self.shared_memory: set[str] = set()  # files in /dev/shm that a collector mapped when it was killed
        self._kill_at: float | None = None  # None until the present collector streams
        self._child = self._start()

    def end(self) -> None:
        self.shared_memory |= mapped_shared_memory(self._child.pid)
        self._child.kill()
        self._child.wait()

    def poll(self, *, streaming: bool) -> None:
        """Kill the present collector once its time is up: at most 3 s after it began to stream. Start the next one."""
        now = time.monotonic()
        if streaming and self._kill_at is None:
            self._kill_at = now + self._source.choice([0.05, 0.3, 1.0, 3.0]) * self._source.random()
        if self._kill_at is not None and now > self._kill_at:
            self.end()
            self.kills, self.incarnation, self._kill_at = self.kills + 1, self.incarnation + 1, None
            self._child = self._start()
        assert self._child.poll() is None, "a collector ended although it was not killed"

    def _start(self) -> subprocess.Popen:
        script = Path(__file__).with_name("stamped_collector.py")
        command = [sys.executable, str(script), "--run-dir", str(self._run_dir), "--incarnation", str(self.incarnation)]
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]))
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)


class CommittedRows:
    """Knows which ring row holds which tick of which incarnation. It learns it from commits alone."""

    def __init__(self, capacity: int, ticks: int) -> None:
        self.capacity, self.ticks = capacity, ticks
        self.commits = 0
        self._row: dict[int, int] = {}
        self._key_in_row: dict[int, int] = {}
        self._next_tick: dict[int, int] = {}

    def commit(self, incarnation: int, row: int) -> None:
        """Record a committed chunk and forget the rows that it overwrites."""
        first = self._next_tick.get(incarnation, 0)
        for k in range(self.ticks):
            key = incarnation * 10**7 + first + k
            self._row.pop(self._key_in_row.get(row + k, -1), None)
            self._row[key], self._key_in_row[row + k] = row + k, key
        self._next_tick[incarnation] = first + self.ticks
        self.commits += 1

    def row_of(self, incarnation: torch.Tensor, tick: torch.Tensor) -> torch.Tensor:
        """Return the ring row that holds each tick, -1 for one that was never committed or was overwritten."""
        keys = (incarnation * 10**7 + tick).view(-1).tolist()
        return torch.tensor([self._row.get(key, -1) for key in keys]).view(incarnation.shape)


class Checker:
    """Takes the place of the gradient step and checks every sampled window against what was committed."""

    def __init__(
        self,
        spec: StreamSpec,
        settings: Settings,
        waiting: WaitingLearner,
        rows: CommittedRows,
        killer: Killer,
        stop: StopFlag,
    ) -> None:
        self.spec, self.policy = spec, Policy(spec, settings.networks)
        self.world_model = self.critic = None
        self.num_windows = self.max_threads = 0
        self._waiting, self._rows, self._killer, self._stop = waiting, rows, killer, stop
        self._end = time.monotonic() + SECONDS

    def __call__(self, batch: TensorDict) -> Numbers:
        link, rows = self._waiting.link, self._rows
        assert link.shared is not None
        incarnation, env, tick = batch["obs", "stamp"].long().unbind(-1)  # each (B, L)
        row = rows.row_of(incarnation, tick)
        assert (row >= 0).all(), "a sampled row was never committed"
        assert (row.diff(dim=1) % rows.capacity == 1).all(), "rows are out of order, or old and new ones are mixed"
        assert (env == env[:, :1]).all() and ((env >= 0) & (env < NUM_ENVS)).all(), "rows of two environments"
        position = (row - link.shared.replay.first) % rows.capacity
        assert (position < link.shared.replay.num_rows).all(), "a row out of the sampler's reach"
        new = incarnation.diff(dim=1) != 0
        assert (tick.diff(dim=1)[~new] == 1).all() and (tick[:, 1:][new] == 0).all()
        assert batch["is_first"][:, 1:][new].all(), "an incarnation begins with a reset"
        check_dynamics(batch)
        assert (batch["policy_version"] <= self._waiting.counters.policy_version).all()
        self.num_windows += len(row)
        self.max_threads = max(self.max_threads, threading.active_count())
        self._killer.poll(streaming=link.streaming is not None)
        self._stop_when_done()
        return Numbers(STEP_METRICS, torch.zeros(len(STEP_METRICS)))

    def is_enough(self) -> bool:
        """Return whether enough was checked for the test to mean something."""
        killer, rows = self._killer, self._rows
        return killer.kills >= MIN_KILLS and rows.commits > MIN_COMMITS and self.num_windows > MIN_WINDOWS

    def _stop_when_done(self) -> None:
        now = time.monotonic()
        if now > self._end and (self.is_enough() or now > self._end + GRACE_S):
            self._stop.requested = True

    def observe_statistics(self, obs) -> None:
        return None

    def tensors(self) -> dict:
        return {"actor": {"weight": torch.zeros(1)}}

    def parameter_counts(self) -> dict:
        return {}


def check_dynamics(batch: TensorDict) -> None:
    """Compute every row from the row before with the pendulum's equations. A torn row would not fit."""
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


class NoDiagnostics:
    """Takes the place of the parts of `Measurements`: there is no model to measure."""

    metrics = ()

    def __init__(self, *args, **kwargs) -> None:
        pass

    def features(self, batch: TensorDict) -> torch.Tensor:
        return torch.zeros(0)

    def __call__(self, *args: object) -> Numbers:
        return Numbers((), torch.zeros(0))


@pytest.fixture
def run_dir(tmp_path):
    lock = create_run_folder(tmp_path / "run")
    socket_dir = make_socket_dir()
    write_json(lock.folder.run_json, {"run_id": "integrity", "socket_dir": str(socket_dir)})
    yield lock.folder.path
    remove_socket_dir(socket_dir, is_own=True)
    lock.release()


@pytest.fixture
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loud_memory(monkeypatch):
    """Fill new replay memory with a value that the checks find if an unwritten row is sampled."""
    create = startup.create_memfd_slab

    def create_loud(num_bytes):
        slab, fd = create(num_bytes)
        slab.fill_(LOUD)
        return slab, fd

    monkeypatch.setattr(startup, "create_memfd_slab", create_loud)


@pytest.mark.usefixtures("one_torch_thread", "loud_memory")
def test_no_sampled_window_is_torn_stale_or_unwritten_while_collectors_are_killed(
    run_dir, monkeypatch, record_property
):
    settings = compose("quickstart", OVERRIDES)
    save_settings(settings, run_dir / "config.yaml")
    geometry = Geometry.of(settings)
    shared_memory, num_threads = mapped_shared_memory(os.getpid()), threading.active_count()
    stop = StopFlag()
    process = Process(
        run_dir, settings, read_run(run_dir), configure(run_dir, "learner"),
        Progress.create(run_dir / "learner.progress"), stop,
    )  # fmt: skip
    waiting = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    rows, killer, checkers = CommittedRows(geometry.capacity, geometry.ticks_per_chunk), Killer(run_dir), []

    def make_checker(spec, settings, *, device):
        checkers.append(Checker(spec, settings, waiting, rows, killer, stop))
        return checkers[-1]

    monkeypatch.setattr(startup, "GradientStep", make_checker)
    for part in ("Diagnostics", "ReturnCheck", "SaturationCheck"):
        monkeypatch.setattr(measurements, part, NoDiagnostics)
    poll = waiting.link.poll

    def recording_poll():
        chunks = poll()
        for chunk in chunks:
            rows.commit(waiting.link.incarnation, chunk.commit.row)
        return chunks

    monkeypatch.setattr(waiting.link, "poll", recording_poll)
    try:
        learner = waiting.run()
        assert learner is not None
        learner.run()
    finally:
        killer.end()
    (checker,) = checkers
    figures = {"kills": killer.kills, "commits": rows.commits, "windows": checker.num_windows}
    assert checker.max_threads == num_threads, "the learner's loop starts no Python thread"
    assert not killer.shared_memory, "a collector maps no named shared memory, which a kill would leave behind"
    assert mapped_shared_memory(os.getpid()) <= shared_memory
    record_property("kills_commits_windows", tuple(figures.values()))
    sys.stderr.write(f"{figures}\n")
    if not checker.is_enough():
        pytest.skip(f"too little was checked in {SECONDS + GRACE_S:.0f} s: {figures}; all of it was right")
