"""Rows of metrics.jsonl: their columns, windows and means, and the rows that a resume deletes."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import pytest
import torch

from learner_proc.evaluation import EvaluationLog
from learner_proc.metrics_writer import MetricsWriter, check_complete, cut_after
from learner_proc.numbers import Numbers
from learner_proc.row_bounds import RowBounds
from learner_proc.totals import Counters
from shared import metrics
from shared.messages import Commit
from shared.metrics import LOSS_MODEL, METRICS, NAN_SKIPS, OPEN_LOOP, SKIPPED, Metric

ONCE_PER_ROW = (
    metrics.IMAGINED_VALUE,
    metrics.RECORDED_RETURN,
    metrics.SAMPLED_VERSION_MEAN,
    *RowBounds.metrics,
)
STEP_METRICS = tuple(
    metric
    for metric in METRICS.values()
    if metric.group in ("loss", "model", "behavior", "gradient") and metric not in (*ONCE_PER_ROW, NAN_SKIPS)
)
CONSTANTS = (metrics.REPLAY_RATIO_TARGET, metrics.TRANSPORT, metrics.TRANSPORT_BYTES_PER_S, metrics.STARTUP_S)
RETURNS = (metrics.EPISODE_RETURN_MEAN, metrics.EVAL_RETURN_MEAN, metrics.RANDOM_RETURN_MEAN)
FURTHER = {
    metrics.REPLAY_RATIO: 2.0,
    metrics.MESSAGES_DROPPED: 0,
    metrics.PUBLICATIONS_SKIPPED: 0,
    metrics.ROLLBACKS: 0,
}


def measured(loss: float, skipped: float = 0.0) -> Numbers:
    """Return the numbers of one gradient step; those that no test looks at are 0."""
    values = torch.zeros(len(STEP_METRICS))
    values[STEP_METRICS.index(LOSS_MODEL)] = loss
    values[STEP_METRICS.index(SKIPPED)] = skipped
    return Numbers(STEP_METRICS, values)


def make(tmp_path: Path, counters: Counters | None = None) -> tuple[MetricsWriter, Counters]:
    counters = counters or Counters()
    constants = dict.fromkeys(CONSTANTS, 0) | {metrics.TRANSPORT: "memfd"}
    writer = MetricsWriter(
        tmp_path / "metrics.jsonl", torch.device("cpu"), counters,
        constants=constants, once_per_row=ONCE_PER_ROW, streaming_since=0.0,
        evaluations=EvaluationLog(tmp_path / "evaluations.jsonl", num_episodes=1, eval_in_replay=True),
    )  # fmt: skip
    return writer, counters


def request_row(writer: MetricsWriter) -> None:
    writer.request_row(None, FURTHER)


def rows(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def column(tmp_path: Path, metric: Metric) -> list:
    return [row[metric.name] for row in rows(tmp_path)]


def commit(returns=(), kinds=(), version=0, unnamed=0, gpu_bytes=0) -> Commit:
    count = len(returns)
    return Commit(
        seq=1,
        row=0,
        agent_steps=100,
        env_frames=200,
        policy_version=version,
        returns=struct.pack(f"<{count}f", *returns),
        lengths=struct.pack(f"<{count}i", *([10] * count)),
        kinds=bytes(kinds),
        versions=struct.pack(f"<{count}q", *[version * (kind == 1) for kind in kinds]),
        num_episodes=count + unnamed,
        rss_bytes=1_500_000_000,
        gpu_bytes=gpu_bytes,
        device_bytes=gpu_bytes,
    )


def test_a_row_holds_the_means_of_its_own_window(tmp_path):
    writer, counters = make(tmp_path)
    for losses in ((1.0, 3.0), (10.0, 20.0, 30.0)):
        for loss in losses:
            writer.add_step(measured(loss))
            counters.gradient_steps += 1
        request_row(writer)
    assert column(tmp_path, LOSS_MODEL) == [2.0, 20.0]
    assert column(tmp_path, metrics.GRADIENT_STEPS) == [2, 5]
    assert column(tmp_path, metrics.TRANSPORT) == ["memfd", "memfd"]


def test_a_row_has_every_declared_metric_in_the_order_of_the_declarations(tmp_path):
    writer, _ = make(tmp_path)
    writer.add_step(measured(1.0))
    request_row(writer)
    assert list(rows(tmp_path)[0]) == list(METRICS)


def test_a_run_that_is_stopped_before_its_first_step_still_writes_a_whole_row(tmp_path):
    writer, _ = make(tmp_path)
    request_row(writer)
    (row,) = rows(tmp_path)
    assert list(row) == list(METRICS) and row[LOSS_MODEL.name] is None and row[NAN_SKIPS.name] == 0


def test_a_metric_that_is_declared_and_not_written_raises(tmp_path):
    writer, _ = make(tmp_path)
    writer.add_step(Numbers((LOSS_MODEL, SKIPPED), torch.zeros(2)))
    with pytest.raises(AssertionError, match=r"metrics not written: .*'loss_obs'"):
        request_row(writer)


def test_a_metric_that_is_written_and_not_declared_raises():
    row = dict.fromkeys(METRICS.values())
    check_complete(row | {OPEN_LOOP.member("policy", 5): 0.1})
    with pytest.raises(AssertionError, match="metrics not declared: \\['loss_typo'\\]"):
        check_complete(row | {Metric("loss_typo", "loss/typo", "nats", "A loss that is not declared."): 0.0})


def test_training_evaluation_and_random_episodes_have_separate_means(tmp_path):
    writer, _ = make(tmp_path)
    writer.add_commit(
        commit(returns=(1.0, 5.0, 100.0, 3.0), kinds=(0, 1, 2, 0), version=4), newest_version=6, collector=1
    )
    writer.add_step(measured(0.0))
    request_row(writer)
    assert [column(tmp_path, metric) for metric in RETURNS] == [[2.0], [5.0], [100.0]]
    (row,) = rows(tmp_path)
    assert (row["episodes"], row["agent_steps"], row["env_frames"], row["policy_lag_mean"]) == (4, 100, 200, 2.0)


def test_episodes_are_counted_by_the_collector_and_not_by_the_list(tmp_path):
    writer, counters = make(tmp_path)
    for _ in range(3):
        writer.add_commit(commit(returns=(1.0, 2.0), kinds=(0, 1), unnamed=8190), newest_version=0, collector=1)
    assert counters.episodes == 3 * 8192


def test_a_row_reports_the_collectors_memory_from_its_last_commit(tmp_path):
    writer, _ = make(tmp_path)
    for gpu_bytes in (0, 2_000_000_000):
        request_row(writer)
        writer.add_commit(commit(gpu_bytes=gpu_bytes), newest_version=0, collector=1)
        writer.add_step(measured(0.0))
    request_row(writer)
    assert column(tmp_path, metrics.COLLECTOR_RSS_GB) == [None, 1.5, 1.5]
    assert column(tmp_path, metrics.COLLECTOR_GPU_GB) == [None, None, 2.0]
    assert column(tmp_path, metrics.SIM_GPU_USED_GB) == [None, None, 2.0]
    assert min(column(tmp_path, metrics.LEARNER_RSS_GB)) > 0.05
    assert column(tmp_path, metrics.LEARNER_GPU_GB) == [None] * 3


def test_a_step_without_a_finite_gradient_does_not_spoil_the_mean_of_its_window(tmp_path):
    writer, counters = make(tmp_path)
    writer.add_step(measured(1.0))
    writer.add_step(measured(float("nan"), skipped=1.0))
    request_row(writer)
    assert column(tmp_path, LOSS_MODEL) == [1.0] and column(tmp_path, SKIPPED) == [0.5]
    assert writer.sums.poll_marks() == 0 and counters.nan_skips == 1


def test_windows_without_a_finite_gradient_are_counted_in_a_row(tmp_path):
    writer, counters = make(tmp_path)
    for _ in range(2):
        writer.add_step(measured(1.0, skipped=1.0))
        request_row(writer)
    assert writer.sums.poll_marks() == 2 and counters.nan_skips == 2
    writer.add_step(measured(1.0))
    request_row(writer)
    assert writer.sums.poll_marks() == 0 and counters.nan_skips == 2


def test_a_window_without_a_finite_value_has_null(tmp_path):
    writer, _ = make(tmp_path)
    writer.add_step(measured(float("inf"), skipped=1.0))
    request_row(writer)
    assert column(tmp_path, LOSS_MODEL) == [None], "JSON cannot express infinity"


def test_a_request_without_steps_since_the_last_row_writes_nothing(tmp_path):
    writer, _ = make(tmp_path)
    writer.add_step(measured(1.0))
    request_row(writer)
    request_row(writer)
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("tail", ["", '{"gradient_steps": 31, "torn'])
def test_a_resume_deletes_the_rows_that_are_newer_than_its_checkpoint(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"gradient_steps": step}) + "\n" for step in (10, 20, 30)) + tail)
    cut_after(path, 20)
    assert column(tmp_path, metrics.GRADIENT_STEPS) == [10, 20]


def test_mean_returns_survive_a_resume(tmp_path):
    writer, counters = make(tmp_path)
    writer.add_commit(
        commit(returns=(1.0, 5.0, 100.0, 3.0), kinds=(0, 1, 2, 0), version=4), newest_version=6, collector=1
    )
    resumed, _ = make(tmp_path, counters)
    resumed.episodes.load_state(json.loads(json.dumps(writer.episodes.state())))
    resumed.add_commit(commit(returns=(8.0,), kinds=(0,), version=4), newest_version=6, collector=1)
    resumed.add_step(measured(0.0))
    request_row(resumed)
    assert [column(tmp_path, metric)[-1] for metric in RETURNS] == [4.0, 5.0, 100.0]
    assert column(tmp_path, metrics.EPISODE_LENGTH_MEAN)[-1] == 10.0


def test_the_live_status_has_the_counters_and_mean_returns(tmp_path):
    writer, counters = make(tmp_path)
    counters.gradient_steps = 7
    writer.add_commit(commit(returns=(1.0, 5.0), kinds=(0, 1), version=4), newest_version=6, collector=1)
    status = writer.status(total_optim_steps=100, replay_ratio=2.0, replay_ratio_target=None)
    assert (status.gradient_steps, status.agent_steps, status.total_optim_steps) == (7, 100, 100)
    assert (status.episode_return_mean, status.eval_return_mean, status.policy_lag_mean) == (1.0, 5.0, 2.0)


def test_a_row_that_cannot_be_written_is_lost_and_training_goes_on(tmp_path, monkeypatch):
    writer, _ = make(tmp_path)
    writer.add_step(measured(1.0))
    with monkeypatch.context() as patch:

        def full(file, line):
            raise OSError(errno.ENOSPC, "no space left")

        patch.setattr("shared.files.LineFile.append", full)
        request_row(writer)
    writer.add_step(measured(2.0))
    request_row(writer)
    assert column(tmp_path, LOSS_MODEL) == [2.0]


def test_lines_of_bytes_that_are_no_text_are_deleted_at_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"gradient_steps": 5}\n\xff\xfe\n{"gradient_steps": 9}\n')
    cut_after(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"gradient_steps": 5}\n'
