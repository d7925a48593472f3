"""Writes metrics.jsonl, one row every `optimization.log_every` gradient steps, and makes the live status."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
import torch

from learner_proc.device_sums import DeviceSums
from learner_proc.evaluation import EvaluationLog
from learner_proc.numbers import Numbers
from learner_proc.totals import TRAIN_WINDOW, Counters, Episodes, Pace, mean
from shared import metrics
from shared.files import LineFile, write_atomic
from shared.memory import Memory, MemoryMeter, gigabytes
from shared.messages import Commit
from shared.metrics import METRICS, LearnerStatus, Metric, Value, find, to_row


class MetricsWriter:
    """Collects numbers from gradient steps and commits, and writes rows.

    It waits for the GPU only at the end, or if a row is requested before the numbers of the previous one have arrived.
    `request_row` ends a window and starts the copy of its numbers from the device; `poll` writes the row once they have
    arrived. A row has every metric that is declared in `shared.metrics`, and no other column.
    It is one class because everything in it ends up in the same rows.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        counters: Counters,
        *,
        constants: Mapping[Metric, Value],
        once_per_row: tuple[Metric, ...],
        streaming_since: float,
        evaluations: EvaluationLog,
    ) -> None:
        """Open the file and delete the rows that are newer than `counters`, that is, than the checkpoint of a resume.

        constants: numbers that are the same in every row. once_per_row: the metrics that `request_row` is given from
        the device. streaming_since: when the collector began to stream, time.monotonic() seconds. evaluations: is
        closed with this writer.
        """
        cut_after(path, counters.gradient_steps)
        self._file = LineFile(path)
        self.on_row: Callable[[Mapping[Metric, Value]], None] | None = None  # called with each row that is complete
        self._has_rows = path.stat().st_size > 0
        self._counters, self._constants = counters, constants
        self.sums = DeviceSums(device, once_per_window=once_per_row)
        self._requested: dict[Metric, Value] = {}  # the host's numbers of the row whose other numbers are being copied
        self.evaluations = evaluations
        self.episodes, self._pace = Episodes(), Pace(counters, streaming_since=streaming_since)
        self._lags: deque[int] = deque(maxlen=TRAIN_WINDOW)
        self._began = time.monotonic() - counters.wall_s
        self._meter, self._collector_memory = MemoryMeter(str(device), whole_device=False), Memory(0)
        self._diverged_before = 0

    def add_commit(self, commit: Commit, *, newest_version: int, collector: int) -> None:
        """Count a commit.

        newest_version: the version that was published last when it arrived. collector: number of the process that sent
        it.
        """
        counters = self._counters
        counters.agent_steps += commit.agent_steps
        counters.eval_agent_steps += commit.eval_steps
        counters.env_frames += commit.env_frames
        counters.episodes += commit.num_episodes
        counters.num_diverged += max(0, commit.num_diverged - self._diverged_before)  # a restart counts from 0 again
        self._diverged_before = commit.num_diverged
        self.episodes.add(commit)
        self.evaluations.add(commit, collector=collector)
        self._collector_memory = Memory(commit.rss_bytes, commit.gpu_bytes, commit.device_bytes)
        if commit.policy_version > 0:
            self._lags.append(newest_version - commit.policy_version)

    def begin_round(self) -> None:
        """Forget what a resumed process would not know either (`learner_proc.rounds`). A row must just be written."""
        self._lags, self._diverged_before, self.skipped_in_a_row = deque(maxlen=TRAIN_WINDOW), 0, 0

    def add_step(self, numbers: Numbers) -> None:
        """Add what one gradient step measured. Call it before the step is counted."""
        self.sums.add(numbers)
        self._pace.count_step()

    def request_row(self, measured: Numbers | None, further: Mapping[Metric, Value]) -> None:
        """Ask for a row. Nothing is written if no gradient step was made since the last row.

        measured: the numbers of `once_per_row`, or of its last metrics if the others cannot be measured yet. further:
        what only the caller knows.
        """
        self.poll(wait=True)
        if self.sums.num_steps == 0 and self._has_rows:
            return
        self._has_rows, self._requested = True, self._host_numbers() | dict(further)
        self._pace.start_window()
        self.sums.request(measured)
        self.poll()

    def poll(self, *, wait: bool = False) -> None:
        """Write the requested row if its numbers have arrived. wait: wait for them."""
        window = self.sums.result(wait=wait)
        if window is None:
            return
        self._counters.nan_skips += window.num_skipped
        row = {**self._constants, **self._requested, **window.values, metrics.NAN_SKIPS: self._counters.nan_skips}
        if window.num_steps == 0:  # the run was stopped before its first step, so no step has named its metrics
            row = dict.fromkeys(METRICS.values()) | row
        check_complete(row)
        try:
            self._file.append(json.dumps(to_row(in_order(row))))
        except OSError as error:  # for example a full disk: the numbers of one row are no reason to end the training
            structlog.get_logger().warning("a row of metrics.jsonl could not be written", error=str(error))
        if self.on_row is not None:
            self.on_row(row)

    def status(
        self, *, total_optim_steps: int, replay_ratio: float, replay_ratio_target: float | None
    ) -> LearnerStatus:
        """Return the live status."""
        self._count_time()
        means = self.episodes.means()
        return LearnerStatus(
            gradient_steps=self._counters.gradient_steps,
            agent_steps=self._counters.agent_steps,
            total_optim_steps=total_optim_steps,
            updates_per_s=self._pace.rates()[metrics.UPDATES_PER_S],
            replay_ratio=replay_ratio,
            replay_ratio_target=replay_ratio_target,
            policy_lag_mean=mean(self._lags),
            episode_return_mean=means[metrics.EPISODE_RETURN_MEAN],
            eval_return_mean=means[metrics.EVAL_RETURN_MEAN],
        )

    def close(self) -> None:
        """Close metrics.jsonl and evaluations.jsonl."""
        self._file.close()
        self.evaluations.close()

    def _host_numbers(self) -> dict[Metric, Value]:
        """Return the numbers of a row that are known on the host."""
        self._count_time()
        counters, own, collector = self._counters, self._meter.read(), self._collector_memory
        return {
            metrics.TIME: time.time(),
            metrics.WALL_S: counters.wall_s,
            metrics.GRADIENT_STEPS: counters.gradient_steps,
            metrics.AGENT_STEPS: counters.agent_steps,
            metrics.EVAL_AGENT_STEPS: counters.eval_agent_steps,
            metrics.ENV_FRAMES: counters.env_frames,
            metrics.EPISODES: counters.episodes,
            metrics.NUM_DIVERGED: counters.num_diverged,
            metrics.POLICY_VERSION: counters.policy_version,
            metrics.POLICY_LAG_MEAN: mean(self._lags),
            metrics.LEARNER_RSS_GB: gigabytes(own.rss_bytes),
            metrics.LEARNER_GPU_GB: gigabytes(own.gpu_bytes),
            metrics.COLLECTOR_RSS_GB: gigabytes(collector.rss_bytes),
            metrics.COLLECTOR_GPU_GB: gigabytes(collector.gpu_bytes),
            metrics.SIM_GPU_USED_GB: gigabytes(collector.device_bytes),
            **self.episodes.means(),
            **self.evaluations.newest,
            **self._pace.rates(),
        }

    def _count_time(self) -> None:
        """Update the time that the run has trained, over all its processes."""
        self._counters.wall_s = time.monotonic() - self._began


def check_complete(row: Mapping[Metric, Value]) -> None:
    """Raise AssertionError unless the row has exactly the declared metrics, and perhaps members of families."""
    missing = [name for name, metric in METRICS.items() if metric not in row]
    undeclared = [metric.name for metric in row if find(metric.name) != metric]
    assert not missing and not undeclared, f"metrics not written: {missing}; metrics not declared: {undeclared}"


def in_order(row: Mapping[Metric, Value]) -> dict[Metric, Value]:
    """Return the row in the order of the declarations, followed by the members of families."""
    return {metric: row[metric] for metric in METRICS.values()} | dict(row)


def cut_after(path: Path, gradient_steps: int, *, column: Metric = metrics.GRADIENT_STEPS) -> None:
    """Delete the rows that a resume has undone: those with more gradient steps than the checkpoint it starts from.

    column: the one that has the gradient steps of a row.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _steps_of(line, column) <= gradient_steps]
    if len(kept) != len(lines):
        write_atomic(path, b"".join(kept))


def _steps_of(line: bytes, column: Metric) -> float:
    """Return the gradient steps of a row; infinity for a line that is not a row."""
    try:
        return json.loads(line)[column.name]
    except (ValueError, KeyError, TypeError):
        return math.inf
