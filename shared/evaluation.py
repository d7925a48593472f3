"""Which environments evaluate, and how many of their episodes make one evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.config import CollectorSettings
from shared.stream import evaluation_columns

MAX_COUNTED = 500  # environments whose episodes count; so every commit has room for all episodes of an evaluation


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation is the same number of episodes in each counted column, all of one policy version.

    columns: the environments that act without noise. counted: those of them whose episodes count, which are all of them
    if there are at most MAX_COUNTED. per_column: episodes of each. If every column plays the same number, then short
    episodes do not count more often than long ones.
    """

    columns: tuple[int, ...]
    counted: tuple[int, ...]
    per_column: int

    @staticmethod
    def of(collector: CollectorSettings, num_envs: int) -> EvaluationPlan:
        """Return the plan for a number of environments."""
        columns = evaluation_columns(num_envs, collector.eval_envs)
        chosen = evaluation_columns(len(columns), min(len(columns), MAX_COUNTED))
        counted = tuple(columns[index] for index in chosen)
        per_column = math.ceil((collector.eval_episodes or 1) / max(1, len(counted)))
        return EvaluationPlan(tuple(columns), counted, per_column)

    def training_columns(self, num_envs: int) -> list[int]:
        """Return the environments that do not evaluate."""
        return sorted(set(range(num_envs)) - set(self.columns))

    @property
    def num_episodes(self) -> int:
        """Return the number of episodes of one evaluation."""
        return len(self.counted) * self.per_column
