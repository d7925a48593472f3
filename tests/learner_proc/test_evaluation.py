"""Evaluations in the learner: what is recorded of them, and their statistics."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from learner_proc.evaluation import COLUMNS, EvaluationLog, read_evaluations, statistics
from learner_proc.metrics_writer import cut_after
from learner_proc.totals import Counters
from shared import metrics
from shared.messages import Commit

EVAL, TRAIN, WAITING = 1, 0, 3


def commit(*episodes: tuple[float, int, int]) -> Commit:
    """Return a commit of episodes: return, kind and evaluated version."""
    count = len(episodes)
    returns, kinds, versions = zip(*episodes, strict=True) if episodes else ((), (), ())
    return Commit(
        1, 0, 100, 200, 9,
        returns=struct.pack(f"<{count}f", *returns), lengths=struct.pack(f"<{count}i", *[10] * count),
        kinds=bytes(kinds), versions=struct.pack(f"<{count}q", *versions), num_episodes=count,
    )  # fmt: skip


def open_log(folder: Path, *, num_episodes: int = 2, eval_in_replay: bool = True) -> EvaluationLog:
    return EvaluationLog(folder / "evaluations.jsonl", num_episodes=num_episodes, eval_in_replay=eval_in_replay)


def publish(log: EvaluationLog, *versions: int) -> None:
    """Note that version v was published after 10 v steps, 100 v agent steps, of which 25 v evaluated."""
    for v in versions:
        counters = Counters(gradient_steps=10 * v, agent_steps=100 * v, eval_agent_steps=25 * v, env_frames=200 * v)
        log.published(v, counters)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_a_complete_evaluation_is_recorded_with_the_counts_at_its_versions_publication(tmp_path):
    log = open_log(tmp_path)
    publish(log, 3, 4, 5)
    log.add(commit((1.0, EVAL, 4), (50.0, TRAIN, 0), (70.0, WAITING, 0)), collector=1)
    assert log.newest[metrics.EVALUATIONS] == 0 and lines(tmp_path) == []
    log.add(commit((3.0, EVAL, 4)), collector=1)
    (line,) = lines(tmp_path)
    assert line["returns"] == [1.0, 3.0] and line["evaluation_mean"] == 2.0 and line["evaluation_episodes"] == 2
    assert [line[f"evaluation_{name}"] for name in ("version", "gradient_steps", "agent_steps", "env_frames")] == [
        4, 40, 400, 800,
    ]  # fmt: skip
    assert set(log.newest) == set(COLUMNS) and log.newest[metrics.EVALUATIONS] == 1


def test_rows_of_evaluations_that_are_not_learned_from_do_not_count_as_steps(tmp_path):
    log = open_log(tmp_path, num_episodes=1, eval_in_replay=False)
    publish(log, 4)
    log.add(commit((1.0, EVAL, 4)), collector=1)
    assert (log.newest[metrics.EVALUATION_AGENT_STEPS], log.newest[metrics.EVALUATION_ENV_FRAMES]) == (300, 600)


def test_a_version_keeps_the_counts_of_its_first_publication(tmp_path):
    """A publication that is skipped leaves the version as it was."""
    log = open_log(tmp_path, num_episodes=1)
    publish(log, 4)
    log.published(4, Counters(gradient_steps=99))
    log.add(commit((1.0, EVAL, 4)), collector=1)
    assert log.newest[metrics.EVALUATION_GRADIENT_STEPS] == 40


@pytest.mark.parametrize("second", [((2.0, EVAL, 4), 2), ((2.0, EVAL, 5), 1)], ids=["another collector", "version"])
def test_episodes_of_two_collectors_or_versions_are_never_joined(tmp_path, second):
    log, (episode, collector) = open_log(tmp_path), second
    publish(log, 4, 5)
    log.add(commit((1.0, EVAL, 4)), collector=1)
    log.add(commit(episode), collector=collector)
    assert log.newest[metrics.EVALUATIONS] == 0
    log.add(commit(episode), collector=collector)
    assert log.newest[metrics.EVALUATION_MEAN] == 2.0


def test_a_resumed_run_continues_after_the_evaluations_that_its_checkpoint_knows(tmp_path):
    log = open_log(tmp_path, num_episodes=1)
    publish(log, 4, 5, 6)
    for version in (4, 5, 6):
        log.add(commit((float(version), EVAL, version)), collector=1)
    log.close()
    cut_after(tmp_path / "evaluations.jsonl", 50, column=metrics.EVALUATION_GRADIENT_STEPS)
    resumed = open_log(tmp_path, num_episodes=1)
    assert resumed.newest[metrics.EVALUATIONS] == 2 and resumed.newest[metrics.EVALUATION_MEAN] == 5.0
    assert [line["evaluations"] for line in read_evaluations(tmp_path / "evaluations.jsonl")] == [1, 2]
    assert read_evaluations(tmp_path / "missing.jsonl") == []


def test_statistics_of_known_returns():
    found = statistics([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0], seed=0)
    assert found[metrics.EVALUATION_MEAN] == 121 / 8 and found[metrics.EVALUATION_MEDIAN] == 3.5
    assert found[metrics.EVALUATION_IQM] == (2 + 3 + 4 + 5) / 4
    assert found == statistics([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0], seed=0), "the seed decides the resampling"
    alone = statistics([7.0], seed=0)
    assert [alone[metric] for metric in (metrics.EVALUATION_MEAN, metrics.EVALUATION_LOW)] == [7.0, None]


def test_the_interval_contains_the_true_mean_in_about_95_of_100_trials():
    source, hits = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        found = statistics(torch.randn(30, generator=source).add(5.0).tolist(), seed=trial)
        low, high = found[metrics.EVALUATION_LOW], found[metrics.EVALUATION_HIGH]
        assert low is not None and high is not None
        hits += low <= 5.0 <= high
    assert 178 <= hits <= 199, hits
