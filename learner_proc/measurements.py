"""What a row of metrics.jsonl reports about freshly sampled windows."""

from __future__ import annotations

import torch

from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics
from learner_proc.gradient_step import GradientStep
from learner_proc.numbers import Numbers
from learner_proc.replay import Replay
from learner_proc.return_check import ReturnCheck
from shared.config import OptimizationSettings
from shared.metrics import SAMPLED_VERSION_MEAN

NUM_WINDOWS = 64


class Measurements:
    """Prediction errors, critic values and the age of the data, measured on NUM_WINDOWS windows of the replay.

    They are measured for each row of metrics.jsonl and not for every gradient step.
    """

    def __init__(self, step: GradientStep, replay: Replay, optimization: OptimizationSettings) -> None:
        self._replay = replay
        # The collector may hold two granted chunks, and granted rows cannot be sampled.
        self.length = min(WINDOW_LENGTH, replay.layout.capacity - 2 * replay.ticks_per_chunk)
        self._diagnostics = Diagnostics(step.spec, step.world_model, step.policy.normaliser, length=self.length)
        self._returns = ReturnCheck(step.world_model, step.policy.normaliser, step.critic, optimization)
        self.metrics = (*self._diagnostics.metrics, *self._returns.metrics, SAMPLED_VERSION_MEAN)

    def __call__(self, *, seed: int) -> Numbers | None:
        """Return the numbers of `metrics`, or None while the replay holds less than one window.

        seed: decides which windows are sampled. The random generator of training is not used, so that measuring does
        not change what is trained. Does not synchronise.
        """
        if self._replay.num_rows < self.length:
            return None
        generator = torch.Generator(self._replay.slab.device).manual_seed(seed)
        batch = self._replay.sample(NUM_WINDOWS, self.length, generator=generator)
        version = Numbers.of({SAMPLED_VERSION_MEAN: batch["policy_version"].float().mean()})
        return Numbers.join([self._diagnostics(batch), self._returns(batch), version])
