"""Gradients that are not finite: earlier states come back, other random numbers are drawn, and a budget ends it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import structlog
import torch

from learner_proc import recovery
from learner_proc.device_sums import DeviceSums
from learner_proc.gradient_step import GradientStep
from learner_proc.learn import Learner
from learner_proc.numbers import Numbers
from learner_proc.publisher import Publisher
from learner_proc.recovery import Recovery
from learner_proc.waiting import WaitingLearner
from learner_proc.warning_lines import WarningLines
from shared.compose import compose
from shared.config import OptimizationSettings
from shared.metrics import SKIPPED
from shared.weights import acting_tensors
from tests.fakes.scripted_collector import SPEC
from tests.learner_proc.conftest import OVERRIDES

CPU = torch.device("cpu")


class Counting:
    """Stands in for a gradient step: its only number is the step at which it was last trained."""

    def __init__(self) -> None:
        self.number = torch.zeros(3)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"world_model": {"weight": self.number}}


class Run:
    """A learner that only counts. `go(n, skipped=True)` makes n steps without a finite gradient."""

    def __init__(self, tmp_path: Path, **options) -> None:
        self.sums, self.counting, self.step = DeviceSums(CPU, once_per_window=()), Counting(), 0
        self.path = tmp_path / "warnings.jsonl"
        lines = WarningLines(self.path, structlog.get_logger())
        settings = OptimizationSettings(**options)
        self.recovery = Recovery(self.counting, settings, self.sums, lines)  # type: ignore[arg-type]

    def go(self, steps: int, *, skipped: bool = False) -> None:
        for _ in range(steps):
            self.step += 1
            if not skipped:
                self.counting.number.fill_(self.step)
            self.sums.add(Numbers((SKIPPED,), torch.tensor([float(skipped)])))
            if self.step % 50 == 0:
                self.sums.request(None)
                self.sums.result()
            self.recovery.check(self.step)

    @property
    def state(self) -> float:
        return self.counting.number[0].item()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "COPY_STEPS", 100)
    monkeypatch.setattr(recovery, "FORGET_STEPS", 1000)


def test_a_streak_brings_back_the_older_copy_and_not_the_one_at_the_edge(tmp_path):
    run = Run(tmp_path, max_skipped=40)
    run.go(255)
    run.go(35, skipped=True)
    assert run.state == 255 and run.recovery.num_rollbacks == 0
    run.go(15, skipped=True)
    assert run.state == 100 and run.recovery.num_rollbacks == 1
    (line,) = run.path.read_text().splitlines()
    assert "went back to its state of step 100" in json.loads(line)["text"]


def test_steps_that_are_skipped_now_and_then_are_no_streak(tmp_path):
    run = Run(tmp_path, max_skipped=20)
    for _ in range(20):
        run.go(19, skipped=True)
        run.go(2)
    assert run.recovery.num_rollbacks == 0


def test_a_streak_counts_across_rows_of_metrics_and_with_any_length(tmp_path):
    for length in (1, 7, 60, 130):
        run = Run(tmp_path, max_skipped=length, max_rollbacks=1000)
        run.go(40)
        run.go(length + 11, skipped=True)
        assert run.recovery.num_rollbacks >= 1, length


def test_before_the_first_copy_is_old_the_learner_goes_back_to_its_start(tmp_path):
    run = Run(tmp_path, max_skipped=20)
    run.go(30)
    run.go(20, skipped=True)
    assert run.state == 0


def test_a_state_is_copied_only_while_gradients_are_finite(tmp_path):
    run = Run(tmp_path, max_skipped=150)
    run.go(120)
    run.go(140, skipped=True)
    run.go(10)
    assert [step for step, _ in run.recovery._copies] == [100, 270], "no copy of the 140 skipped steps"


def test_the_budget_ends_the_run_by_name(tmp_path):
    run = Run(tmp_path, max_skipped=20, max_rollbacks=2)
    run.go(50)
    with pytest.raises(FloatingPointError, match=r"last 20 steps up to step 110 .* 2 roll-backs .*max_rollbacks=2"):
        run.go(200, skipped=True)
    assert run.recovery.num_rollbacks == 2


def test_without_a_budget_the_first_streak_ends_the_run(tmp_path):
    run = Run(tmp_path, max_skipped=20, max_rollbacks=0)
    with pytest.raises(FloatingPointError, match="0 roll-backs"):
        run.go(20, skipped=True)


def test_roll_backs_of_long_ago_no_longer_count(tmp_path):
    run = Run(tmp_path, max_skipped=20, max_rollbacks=1)
    for _ in range(5):
        run.go(20, skipped=True)
        run.go(1200)
    assert run.recovery.num_rollbacks == 5


def test_the_publisher_reports_weights_that_are_not_finite_once(tmp_path):
    module = torch.nn.Linear(2, 2)
    publisher = Publisher(module, socket_dir=tmp_path, run_id="run")
    for value, fault in ((1.0, False), (math.nan, True), (math.inf, True), (2.0, False)):
        with torch.no_grad():
            module.weight[1, 1] = value
        publisher.publish(step=0)
        assert publisher.take_fault() == fault and not publisher.take_fault()
    publisher.close()


def built(process, join) -> tuple[Learner, WaitingLearner]:
    waiting = WaitingLearner(process, device=CPU, resume=False)
    collector = join(waiting.serve)
    for _ in range(2):
        collector.commit_next()
    waiting.serve()
    assert waiting.link.streaming is not None
    return waiting.build(waiting.link.streaming.shared), waiting


@pytest.mark.parametrize("found_by", ["a publication", "skipped steps"])
def test_a_learner_whose_parameter_becomes_nan_trains_on_from_an_earlier_state(process, join, found_by):
    """As after a flipped bit. Every tensor comes back, and the random numbers are not those of before."""
    process.settings.optimization.max_skipped = 4
    learner, waiting = built(process, join)
    learner.serve()
    before = {name: tensor.clone() for name, tensor in acting_tensors(learner._step.policy).items()}
    version, random = learner.publisher.version, torch.get_rng_state()
    with torch.no_grad():
        next(learner._step.policy.actor.parameters())[0, 0] = math.nan
    if found_by == "a publication":
        learner.publish()
        learner.serve()
        assert learner.publisher.version == version + 2, "the second one has the earlier state"
    else:
        for _ in range(6):
            learner.train()
        assert not torch.equal(torch.get_rng_state(), random)
    now = acting_tensors(learner._step.policy)
    assert now["normaliser.entries.policy.count"] == 32, "the rows stay in the statistics"
    assert all(torch.equal(now[name], before[name]) for name in before)
    for _ in range(12):
        learner.train()
    assert learner._writer.sums.poll_marks() == 0 and learner._recovery.num_rollbacks == 1
    waiting.link.close()


def test_a_learner_whose_losses_are_never_finite_ends_by_name_within_its_budget(process, join):
    process.settings.optimization.max_skipped, process.settings.optimization.max_rollbacks = 10, 1
    learner, waiting = built(process, join)
    learner.replay.views["reward"][:] = math.nan  # past the check at the commit
    with pytest.raises(FloatingPointError, match="1 roll-backs to earlier states did not help"):
        for _ in range(60):
            learner.train()
    assert not learner._saver._process.run_dir.joinpath("checkpoints", "latest").exists()
    waiting.link.close()


@pytest.mark.gpu
def test_copies_marks_and_a_roll_back_never_synchronise_a_gpu(tmp_path):
    device = torch.device("cuda")
    settings = compose("quickstart", [*OVERRIDES, "optimization.max_skipped=20"])
    step, sums = GradientStep(SPEC, settings, device=device), DeviceSums(device, once_per_window=())
    lines = WarningLines(tmp_path / "warnings.jsonl", structlog.get_logger())
    made = Recovery(step, settings.optimization, sums, lines)
    weight, numbers = next(step.policy.actor.parameters()), torch.tensor([[0.0], [1.0]], device=device)
    good, healthy, skipped = weight.tolist(), *numbers.unbind()
    for n in range(1, 200):
        torch.cuda.set_sync_debug_mode("error")
        try:
            if n == 110:
                weight.data.fill_(math.nan)
            sums.add(Numbers((SKIPPED,), skipped if n >= 110 and made.num_rollbacks == 0 else healthy))
            made.check(n)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert made.num_rollbacks == 1 and weight.tolist() == good
