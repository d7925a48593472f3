"""Gathers the returns of evaluations, and writes each complete one as a line of evaluations.jsonl.

An evaluation is a fixed number of whole episodes of one policy version (`shared.evaluation`). The collector plays them
while training goes on, so an evaluation that is complete now describes a policy that was published some time ago. Its
line has the counts of the run at that publication.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from learner_proc.totals import Counters
from shared import metrics
from shared.files import LineFile
from shared.messages import EPISODE_KINDS, Commit
from shared.metrics import Metric, Value, parse_row, to_row
from shared.statistics import return_statistics

RETURNS = "returns"  # the key of the single returns in a line, beside the columns of the metrics
COLUMNS = (
    metrics.EVALUATIONS,
    metrics.EVALUATION_VERSION,
    metrics.EVALUATION_GRADIENT_STEPS,
    metrics.EVALUATION_AGENT_STEPS,
    metrics.EVALUATION_ENV_FRAMES,
    metrics.EVALUATION_EPISODES,
    metrics.EVALUATION_MEAN,
    metrics.EVALUATION_MEDIAN,
    metrics.EVALUATION_IQM,
    metrics.EVALUATION_LOW,
    metrics.EVALUATION_HIGH,
)


@dataclass(frozen=True)
class Published:
    """The counts of the run when a policy version was published."""

    gradient_steps: int
    agent_steps: int
    env_frames: int


class EvaluationLog:
    """Knows the newest complete evaluation, and appends every one to a file.

    Episodes of another version, or of another collector process, begin a new evaluation: what a dead collector left
    incomplete is dropped.
    """

    def __init__(self, path: Path, *, num_episodes: int, eval_in_replay: bool) -> None:
        """num_episodes: of one evaluation. eval_in_replay: whether the evaluation's rows are learned from."""
        lines = read_evaluations(path)
        self._file, self._num_episodes, self._in_replay = LineFile(path), num_episodes, eval_in_replay
        last = lines[-1] if lines else {}
        self.newest: dict[Metric, Value] = {metric: last.get(metric.name) for metric in COLUMNS}
        self.newest[metrics.EVALUATIONS] = len(lines)
        self._published: dict[int, Published] = {}
        self._current = (0, 0)  # version and collector
        self._returns: list[float] = []

    def published(self, version: int, counters: Counters) -> None:
        """Note the counts of the run at the publication of a version."""
        learned = counters.learned_steps(eval_in_replay=self._in_replay)
        frames = counters.env_frames * learned // max(counters.agent_steps, 1)
        now = Published(counters.gradient_steps, learned, frames)
        self._published.setdefault(version, now)

    def add(self, commit: Commit, *, collector: int) -> None:
        """Add the episodes of a commit that belong to evaluations. collector: number of the process that sent it."""
        count = len(commit.kinds)
        returns = struct.unpack(f"<{count}f", commit.returns)
        versions = struct.unpack(f"<{len(commit.versions) // 8}q", commit.versions)
        for value, kind, version in zip(returns, commit.kinds, versions, strict=False):
            if EPISODE_KINDS[kind] != "eval":
                continue
            if (version, collector) != self._current:
                self._current, self._returns = (version, collector), []
            self._returns.append(value)
            if len(self._returns) == self._num_episodes:
                self._complete(version, self._returns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _complete(self, version: int, returns: list[float]) -> None:
        """Write the evaluation of a version, unless this process has not published it."""
        published = self._published.get(version)
        if published is None:
            return
        self._published = {known: at for known, at in self._published.items() if known >= version}
        number = self.newest[metrics.EVALUATIONS]
        assert isinstance(number, int), number
        self.newest = {
            metrics.EVALUATIONS: number + 1,
            metrics.EVALUATION_VERSION: version,
            metrics.EVALUATION_GRADIENT_STEPS: published.gradient_steps,
            metrics.EVALUATION_AGENT_STEPS: published.agent_steps,
            metrics.EVALUATION_ENV_FRAMES: published.env_frames,
            metrics.EVALUATION_EPISODES: len(returns),
            **statistics(returns, seed=version),
        }
        line: dict[str, Any] = {**to_row(self.newest), RETURNS: returns}
        try:
            self._file.append(json.dumps(line))
        except OSError as error:  # for example a full disk: one evaluation is no reason to end the training
            structlog.get_logger().warning("an evaluation could not be written", error=str(error))


def statistics(returns: Sequence[float], *, seed: int) -> dict[Metric, float | None]:
    """Return mean, median, interquartile mean and the mean's interval, of at least one return; one has no interval.

    seed: of the resampling.
    """
    found, has_interval = return_statistics(returns, seed=seed), len(returns) > 1
    return {
        metrics.EVALUATION_MEAN: found.mean.value,
        metrics.EVALUATION_MEDIAN: found.median.value,
        metrics.EVALUATION_IQM: found.iqm.value,
        metrics.EVALUATION_LOW: found.mean.low if has_interval else None,
        metrics.EVALUATION_HIGH: found.mean.high if has_interval else None,
    }


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an evaluations.jsonl, oldest first; none if there is no file. A broken line is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for row in map(parse_row, lines) if row is not None]
