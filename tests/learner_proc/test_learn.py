"""The training loop against a collector scripted in this process: weights for restarts, no synchronising call."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learner_proc import publisher
from learner_proc.checkpoint import random_state
from learner_proc.learn import Learner
from learner_proc.waiting import WaitingLearner
from shared.compose import compose
from shared.model.layers import RunningNorm
from shared.run_folder import RunFolder
from shared.stream import plan_layout
from tests.fakes.scripted_collector import SPEC, nothing_spoiled
from tests.learner_proc.conftest import OVERRIDES

# Operations that make the host wait for a GPU: they read a number, or the shape of their result depends on data.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


def built(waiting: WaitingLearner) -> Learner:
    assert waiting.link.streaming is not None
    return waiting.build(waiting.link.streaming.shared)


def test_a_restarted_collector_is_sent_the_weights_until_it_commits(waiting, join, monkeypatch):
    """The first message may be lost because the new collector's subscription is not ready yet."""
    monkeypatch.setattr(publisher, "REPUBLISH_S", 0.0)
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
    learner = built(waiting)
    learner.serve()
    collector.commit_next(version=learner.publisher.version)
    learner.serve()
    collector.channel.close()
    learner.serve()
    sent: list[int] = []
    monkeypatch.setattr(learner.publisher, "republish", lambda: sent.append(learner.publisher.version))
    second = join(learner.serve)
    for _ in range(3):
        learner.idle()
    assert len(sent) == 4 and set(sent) == {learner.publisher.version} and sent[0] > 0
    second.commit_next(version=learner.publisher.version)
    learner.serve()
    learner.idle()
    assert len(sent) == 4, "the second collector has the weights"


class CountWaits(TorchDispatchMode):
    """Counts all operations, and those that make the host wait for a GPU by name."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.calls += 1
        self.waits.update([name] if name in WAITING else [])
        return func(*args, **(kwargs or {}))


def test_the_training_loop_makes_no_synchronising_call_and_has_one_thread(process, join):
    process.settings.replay_buffer.checksum = False  # comparing checksums waits for the device
    waiting = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    threads = threading.active_count()
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
    learner = built(waiting)
    learner.serve()
    assert learner.may_step()
    collector.commit_next()  # this chunk is taken while operations are counted
    with CountWaits() as watched:
        for _ in range(7):  # publishes twice and requests no row
            learner.serve()
            learner.train()
    assert watched.calls > 1000 and learner.publisher.version >= 3 and learner.pacing.collected == 48
    assert not watched.waits
    assert threading.active_count() == threads
    learner.link.close()


def test_requesting_a_row_of_metrics_leaves_the_random_generators_alone(waiting, join):
    """Otherwise `optimization.log_every` would change what is trained."""
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
        waiting.serve()
    learner = built(waiting)
    for _ in range(5):
        learner.serve()
        collector.commit_next()
    learner.serve()
    assert learner.measurements(seed=0) is not None, "the replay holds enough rows to be measured"
    before = random_state(learner.replay, torch.device("cpu"))
    learner.request_row()
    after = random_state(learner.replay, torch.device("cpu"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def absurd(rows) -> None:
    rows["obs", "policy"][2, 0, 1] = 1e25
    rows["obs", "policy"][3, 1, 2] = 1e6
    rows["reward",][4, 0] = 1e30


def not_finite(rows) -> None:
    rows["obs", "policy"][5, 0, 0] = math.nan
    rows["action",][6, 1] = math.inf


@pytest.mark.parametrize("overrides", [[], ["networks.normalize_obs=false"], ["networks.symlog_obs=true"]])
def test_absurd_numbers_and_nan_from_a_collector_leave_a_learner_healthy_and_are_named(process, join, overrides):
    process.settings.networks = compose("quickstart", [*OVERRIDES, *overrides]).networks
    waiting = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    collector = join(waiting.serve)
    for spoil in (absurd, not_finite):  # one is in the first chunk of the run
        collector.commit_next(spoil=spoil)
    learner = built(waiting)
    for step in range(12):
        learner.serve()
        if step % 3 == 0:
            collector.commit_next(spoil=absurd if step == 3 else nothing_spoiled)
        learner.train()
    learner.request_row()
    learner.link.close()
    (row,) = map(json.loads, RunFolder(process.run_dir).metrics.read_text().splitlines())
    assert row["clipped_values"] == 6 and row["masked_rows"] == 2 and row["nan_skips"] == 0
    tensors = [tensor for group in learner._step.tensors().values() for tensor in group.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    if process.settings.networks.normalize_obs:
        norm = learner._step.policy.normaliser.entries["policy"]
        assert isinstance(norm, RunningNorm) and norm.var.sqrt().max() < 10, "the data have standard deviation 1"
    lines = RunFolder(process.run_dir).warnings("learner").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 2 and "reward was 1e+30 (2 times), policy[1] was 1e+25 (2 times), policy[2]" in texts[0]


@pytest.mark.gpu
def test_steps_samples_and_grants_never_synchronise_a_gpu():
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
