"""Evaluations in chosen columns, for tests that follow episodes."""

from __future__ import annotations

import torch

from collector_proc.evaluation import Evaluations
from shared.evaluation import EvaluationPlan


def evaluations_in(columns: tuple[int, ...], num_envs: int, *, per_column: int = 1, version: int = 0) -> Evaluations:
    """Return evaluations in these columns. version: begin with this policy version; 0: none has begun."""
    plan = EvaluationPlan(columns, columns, per_column)
    evaluations = Evaluations(plan, num_envs, device=torch.device("cpu"))
    if version:
        evaluations.begin(version)
    return evaluations
