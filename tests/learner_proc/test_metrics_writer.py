"""Rows of metrics.jsonl: windows, means, and what a resume leaves of them."""

import json
import struct

import pytest
import torch

from learner_proc.metrics_writer import Counters, Report, cut_after
from learner_proc.numbers import Numbers
from shared.messages import Commit
from shared.metrics import LOSS_MODEL, SKIPPED


def measured(loss: float, skipped: float = 0.0) -> Numbers:
    return Numbers((LOSS_MODEL, SKIPPED), torch.tensor([loss, skipped]))


def make(tmp_path, counters=None) -> tuple[Report, Counters]:
    counters = counters or Counters()
    path = tmp_path / "metrics.jsonl"
    return Report(path, torch.device("cpu"), counters, constants={"transport": "memfd"}, streaming_since=0.0), counters


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


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
        num_episodes=count + unnamed,
        rss_bytes=1_500_000_000,
        gpu_bytes=gpu_bytes,
        device_bytes=gpu_bytes,
    )


def test_a_row_holds_the_mean_of_its_window_alone(tmp_path):
    report, counters = make(tmp_path)
    for losses in ((1.0, 3.0), (10.0, 20.0, 30.0)):
        for loss in losses:
            report.add_step(measured(loss))
            counters.gradient_steps += 1
        report.request_row(replay_ratio=2.0)
        report.poll()
    assert [row["loss_model"] for row in rows(tmp_path)] == [2.0, 20.0]
    assert rows(tmp_path)[1]["gradient_steps"] == 5 and rows(tmp_path)[1]["transport"] == "memfd"


def test_training_evaluation_and_random_episodes_are_kept_apart(tmp_path):
    report, _ = make(tmp_path)
    report.add_commit(commit(returns=(1.0, 5.0, 100.0, 3.0), kinds=(0, 1, 2, 0), version=4), newest_version=6)
    report.add_step(measured(0.0))
    report.request_row()
    row = report.poll() or rows(tmp_path)[0]
    assert (row["episode_return_mean"], row["eval_return_mean"], row["random_return_mean"]) == (2.0, 5.0, 100.0)
    assert (row["episodes"], row["agent_steps"], row["env_frames"], row["policy_lag_mean"]) == (4, 100, 200, 2.0)


def test_episodes_are_counted_by_the_collector_and_not_by_the_list(tmp_path):
    report, counters = make(tmp_path)
    for _ in range(3):
        report.add_commit(commit(returns=(1.0, 2.0), kinds=(0, 1), unnamed=8190), newest_version=0)
    assert counters.episodes == 3 * 8192


def test_a_row_tells_the_collectors_memory_of_its_last_commit(tmp_path):
    report, _ = make(tmp_path)
    for gpu_bytes in (0, 2_000_000_000):
        report.request_row()
        report.add_commit(commit(gpu_bytes=gpu_bytes), newest_version=0)
        report.add_step(measured(0.0))
    report.request_row()
    names = ("collector_rss_gb", "collector_gpu_gb", "sim_gpu_used_gb")
    assert [[row[name] for name in names] for row in rows(tmp_path)] == [[None] * 3, [1.5, None, None], [1.5, 2.0, 2.0]]
    assert all(row["learner_rss_gb"] > 0.05 and row["learner_gpu_gb"] is None for row in rows(tmp_path))


def test_windows_without_a_finite_step_are_noticed_and_counted(tmp_path):
    report, counters = make(tmp_path)
    report.add_step(measured(1.0, 0.0))
    report.add_step(measured(float("nan"), 1.0))
    report.request_row()
    assert report.skipped_in_a_row == 0 and counters.nan_skips == 1
    assert rows(tmp_path)[0]["loss_model"] == 1.0, (
        "the mean of the finite steps: a skipped one does not hide the others"
    )
    for _ in range(2):
        report.add_step(measured(1.0, 1.0))
        report.request_row()
    assert report.skipped_in_a_row == 2 and counters.nan_skips == 3
    assert rows(tmp_path)[1]["loss_model"] == 1.0, "one bad window does not poison the next"
    report.add_step(measured(float("inf"), 1.0))
    report.request_row()
    assert rows(tmp_path)[-1]["loss_model"] is None, "JSON has no NaN"


def test_a_second_request_without_steps_writes_no_empty_row(tmp_path):
    report, _ = make(tmp_path)
    report.add_step(measured(1.0, 1.0))
    report.request_row()
    report.request_row()
    assert len(rows(tmp_path)) == 1
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    make(fresh)[0].request_row()
    assert rows(fresh)[0]["loss_model"] is None, "a run stopped before its first step still leaves its counters"


@pytest.mark.parametrize("tail", ["", '{"gradient_steps": 31, "torn'])
def test_a_resume_cuts_the_rows_behind_its_checkpoint(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"gradient_steps": step}) + "\n" for step in (10, 20, 30)) + tail)
    cut_after(path, 20)
    assert [row["gradient_steps"] for row in rows(tmp_path)] == [10, 20]


def test_mean_returns_survive_a_resume(tmp_path):
    report, counters = make(tmp_path)
    report.add_commit(commit(returns=(1.0, 5.0, 100.0, 3.0), kinds=(0, 1, 2, 0), version=4), newest_version=6)
    resumed, _ = make(tmp_path, counters)
    resumed.remember(json.loads(json.dumps(report.recent())))
    resumed.add_commit(commit(returns=(8.0,), kinds=(0,), version=4), newest_version=6)
    resumed.add_step(measured(0.0))
    resumed.request_row()
    row = rows(tmp_path)[-1]
    assert (row["episode_return_mean"], row["eval_return_mean"], row["random_return_mean"]) == (4.0, 5.0, 100.0)
    assert row["episode_length_mean"] == 10.0
