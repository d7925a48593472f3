"""The learner's loop against a collector scripted in the same process: handshake, refusals, no synchronising call."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from launcher.run_folder import create_run_folder
from learner_proc import learn
from learner_proc.checkpoint import random_state
from learner_proc.learn import Learner
from shared.compose import compose
from shared.errors import TransportError
from shared.geometry import Geometry
from shared.handover import Channel, Disconnected, connect, map_memfd_slab
from shared.lifetime import StopFlag
from shared.logs import configure
from shared.messages import PROTOCOL, Commit, Grant, Hello, Message, Refusal, SelfTest, Welcome
from shared.progress import Progress
from shared.run_folder import Run
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views

OVERRIDES = [
    "env.num_envs=2",
    "collector.eval_envs=1",
    "collector.frames_per_batch=16",
    "collector.init_random_frames=32",
    "replay_buffer.buffer_size=256",
    "replay_buffer.batch_size=32",
    "replay_buffer.batch_length=8",
    "replay_buffer.checksum=true",
    "networks.rssm_hidden_dim=8",
    "networks.hidden_dim=8",
    "networks.state_dim=4",
    "optimization.log_every=1000",
    "optimization.publish_every=3",
    "optimization.replay_ratio=null",
]
SPEC = StreamSpec(2, {"policy": ObsSpec((3,), "float32")}, 1)
# Ops that make the host wait for a GPU: reading a number, or a result whose shape depends on data.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


def nothing() -> None:
    return None


class ScriptedCollector:
    """The collector's side of the socket, one message at a time."""

    def __init__(self, socket_dir, ticks: int) -> None:
        self.channel: Channel = connect(socket_dir, deadline_s=5.0, alive=nothing)
        self.ticks = ticks

    def hello(self, **changes) -> None:
        values = {"protocol": PROTOCOL, "run_id": "run", "incarnation": 0, "pid": 1, "spec": SPEC.to_dict()}
        self.channel.send(Hello(**(values | changes)))

    def next(self) -> Message:
        return self.channel.receive_within(5.0, waiting_for="the learner", alive=nothing)[0]

    def attach(self) -> Welcome:
        welcome, fds = self.channel.receive_within(5.0, waiting_for="the welcome", alive=nothing)
        assert isinstance(welcome, Welcome)
        layout = plan_layout(SPEC, welcome.capacity)
        ring = ring_views(map_memfd_slab(fds[0], welcome.num_bytes), layout)
        os.close(fds[0])
        self.writer = ChunkWriter(ring, layout, ticks=self.ticks, device=torch.device("cpu"))
        self.welcome = welcome
        return welcome

    def test(self, error: int = 0) -> None:
        checksum, num_bytes, seconds = self.writer.write_pattern(self.welcome.test_row)
        self.channel.send(SelfTest(checksum + error, num_bytes, seconds))

    def commit(self, grant: Grant, *, error: int = 0, version: int = 0) -> None:
        for _ in range(self.ticks):
            false = torch.zeros(2, dtype=torch.bool)
            arrival = Arrival({"policy": torch.randn(2, 3)}, torch.rand(2), false, false, false)
            self.writer.add(arrival, torch.rand(2, 1), version)
        checksum = self.writer.checksum()
        self.writer.write(grant.row)
        self.channel.send(Commit(grant.seq, grant.row, 16, 32, version, checksum + error, b"", b"", b"", 0, 0, 0, 0, 0))

    def deliver(self, **commit) -> None:
        """The next granted chunk, committed."""
        grant = self.next()
        assert isinstance(grant, Grant)
        self.commit(grant, **commit)


@pytest.fixture
def learner(tmp_path):
    settings = compose("quickstart", OVERRIDES)
    lock = create_run_folder(tmp_path / "run")
    made = Learner(
        settings, Geometry.of(settings), Run("run", str(tmp_path)), run_dir=lock.folder.path,
        device=torch.device("cpu"), progress=Progress.create(lock.folder.progress("learner")), stop=StopFlag(),
        log=configure(lock.folder.path, "learner"), resume=False,
    )  # fmt: skip
    yield made
    made._link.close()
    lock.release()


def join(learner: Learner, tmp_path) -> ScriptedCollector:
    collector = ScriptedCollector(tmp_path, learner._geometry.ticks_per_chunk)
    collector.hello()
    for _ in range(3):
        learner._serve()
    collector.attach()
    collector.test()
    learner._serve()
    assert learner._link.streaming
    return collector


def test_the_first_grant_answers_the_self_test_and_the_prefill_is_granted_at_once(learner, tmp_path):
    collector = join(learner, tmp_path)
    assert collector.welcome.random_frames == 32 and collector.welcome.agent_steps == 0
    grants = [collector.next(), collector.next()]
    assert [grant.row for grant in grants if isinstance(grant, Grant)] == [0, 8]


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"protocol": PROTOCOL + 1}, "one checkout"),
        ({"run_id": "another"}, "same --run-dir"),
        ({"spec": {"num_envs": 2}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"num_envs": float("inf")}}, "malformed stream spec"),
        ({"spec": SPEC.to_dict() | {"action_dim": 1 << 23, "num_envs": 1 << 20}}, "out of bounds"),
        ({"spec": SPEC.to_dict() | {"num_envs": 4}}, "4 environments, wanted 2"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_with_the_mend(learner, tmp_path, changes, part):
    collector = ScriptedCollector(tmp_path, 8)
    collector.hello(**changes)
    for _ in range(3):
        learner._serve()
    refusal = collector.next()
    assert isinstance(refusal, Refusal) and part in refusal.reason
    with pytest.raises(Disconnected):
        collector.next()


def test_a_later_collector_with_another_stream_is_refused(learner, tmp_path):
    join(learner, tmp_path).channel.close()
    learner._serve()
    second = ScriptedCollector(tmp_path, 8)
    second.hello(spec=StreamSpec(2, SPEC.obs, 3).to_dict(), incarnation=1)
    for _ in range(3):
        learner._serve()
    refusal = second.next()
    assert isinstance(refusal, Refusal) and "as at the first hello" in refusal.reason


def test_a_second_collector_is_refused_while_one_is_connected(learner, tmp_path):
    first = join(learner, tmp_path)
    second = ScriptedCollector(tmp_path, 8)
    learner._serve()
    refusal = second.next()
    assert isinstance(refusal, Refusal) and "one at a time" in refusal.reason
    assert learner._link.streaming and isinstance(first.next(), Grant), "the first one goes on"


def test_a_failed_self_test_is_refused_and_grants_nothing(learner, tmp_path):
    collector = ScriptedCollector(tmp_path, 8)
    collector.hello()
    for _ in range(3):
        learner._serve()
    collector.attach()
    collector.test(error=1)
    learner._serve()
    refusal = collector.next()
    assert isinstance(refusal, Refusal) and "self-test failed" in refusal.reason
    assert learner._link.replay is not None and learner._link.replay.num_granted == 0


def test_a_chunk_whose_checksum_differs_stops_the_learner(learner, tmp_path):
    collector = join(learner, tmp_path)
    collector.deliver(error=1)
    with pytest.raises(TransportError, match="checksum"):
        learner._serve()


def test_a_commit_nobody_granted_is_dropped_and_counted(learner, tmp_path):
    collector = join(learner, tmp_path)
    first = collector.next()
    assert isinstance(first, Grant)
    collector.commit(Grant(first.seq + 5, first.row, 0))
    learner._serve()
    assert learner._link.num_dropped == 1 and learner._pacing.collected == 0
    collector.commit(first)
    learner._serve()
    assert learner._pacing.collected == 16


def test_commits_sent_before_a_death_count_and_open_grants_return(learner, tmp_path):
    collector = join(learner, tmp_path)
    first, second = collector.next(), collector.next()
    assert isinstance(first, Grant) and isinstance(second, Grant)
    collector.commit(first)
    collector.channel.close()
    for _ in range(2):
        learner._serve()
    replay = learner._link.replay
    assert replay is not None and replay.num_rows == 8 and replay.num_granted == 0 and not learner._link.streaming
    again = join(learner, tmp_path)
    assert again.welcome.test_row == second.row, "the dead collector's rows are granted again"
    assert again.welcome.random_frames == 16, "the rest of the prefill"


def test_a_new_collector_is_sent_the_weights_until_it_commits(learner, tmp_path, monkeypatch):
    """The one before it had the newest; the first frame may be lost to a subscription that is not up yet."""
    monkeypatch.setattr(learn, "REPUBLISH_S", 0.0)
    collector = join(learner, tmp_path)
    for _ in range(2):
        collector.deliver()
    learner._build()
    learner._serve()
    collector.deliver(version=learner._publisher.version)
    learner._serve()
    collector.channel.close()
    learner._serve()
    sent: list[int] = []
    monkeypatch.setattr(learner._publisher, "republish", lambda: sent.append(learner._publisher.version))
    second = join(learner, tmp_path)
    for _ in range(3):
        learner._idle()
    assert len(sent) == 4 and set(sent) == {learner._publisher.version} and sent[0] > 0
    second.deliver(version=learner._publisher.version)
    learner._serve()
    learner._idle()
    assert len(sent) == 4, "it has them"


class CountWaits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.calls += 1
        self.waits.update([name] if name in WAITING else [])
        return func(*args, **(kwargs or {}))


def test_the_steady_loop_makes_no_synchronising_call_and_has_one_thread(learner, tmp_path):
    learner._settings.replay_buffer.checksum = False  # a debugging aid that waits by nature
    threads = threading.active_count()
    collector = join(learner, tmp_path)
    for _ in range(2):
        collector.deliver()
    learner._build()
    learner._serve()
    assert learner._pacing.may_step()
    collector.deliver()  # arrives inside the watched part
    with CountWaits() as watched:
        for _ in range(7):  # publishes twice, logs never
            learner._serve()
            learner._train()
    assert watched.calls > 1000 and learner._publisher.version >= 3 and learner._pacing.collected == 48
    assert not watched.waits
    assert threading.active_count() == threads


def test_a_row_of_metrics_moves_no_random_stream(learner, tmp_path):
    collector = join(learner, tmp_path)
    for chunk in range(7):
        collector.deliver()
        if chunk == 1:
            learner._build()
        learner._serve()
    replay = learner._link.replay
    assert replay is not None and replay.num_rows >= learner._diagnostic_rows()
    before = random_state(replay, torch.device("cpu"))
    learner._request_row()
    after = random_state(replay, torch.device("cpu"))
    assert all(torch.equal(before[name], after[name]) for name in before), "log_every would change what is trained"


@pytest.mark.gpu
def test_the_steady_loop_never_synchronises_a_gpu(tmp_path):
    settings = compose("quickstart", [*OVERRIDES, "replay_buffer.checksum=false"])
    from learner_proc.gradient_step import GradientStep
    from learner_proc.replay import Replay

    device = torch.device("cuda")
    layout = plan_layout(SPEC, 128)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    replay = Replay(slab, layout, ticks_per_chunk=8, seed=0, device=device)
    for _ in range(8):
        replay.commit(replay.grant())
    step = GradientStep(SPEC, settings, device=device)
    step(replay.sample(4, 8))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step(replay.sample(4, 8))
            step.observe_statistics(replay.chunk(0).get("obs").to_dict())
            replay.commit(replay.grant())
    finally:
        torch.cuda.set_sync_debug_mode("default")
