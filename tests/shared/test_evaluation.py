"""The plan of an evaluation: its columns and their episodes."""

from __future__ import annotations

import pytest

from shared.config import CollectorSettings
from shared.evaluation import EvaluationPlan


@pytest.mark.parametrize(
    ("eval_envs", "eval_episodes", "per_column", "num_episodes"),
    [(2, None, 1, 2), (2, 5, 3, 6), (3, 3, 1, 3), (3, 1, 1, 3), (1, 10, 10, 10), (0, 10, 10, 0), (700, 500, 1, 500)],
)
def test_every_counted_column_plays_the_same_number_of_episodes(eval_envs, eval_episodes, per_column, num_episodes):
    plan = EvaluationPlan.of(CollectorSettings(eval_envs=eval_envs, eval_episodes=eval_episodes), 1000)
    assert len(plan.columns) == eval_envs and set(plan.counted) <= set(plan.columns)
    assert (plan.per_column, plan.num_episodes) == (per_column, num_episodes)
    assert sorted([*plan.columns, *plan.training_columns(1000)]) == list(range(1000))


def test_counted_columns_are_spread_evenly():
    counted = EvaluationPlan.of(CollectorSettings(eval_envs=1000), 4000).counted
    assert len(counted) == 500 and {b - a for a, b in zip(counted, counted[1:], strict=False)} == {8}
