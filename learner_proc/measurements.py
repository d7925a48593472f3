"""What a row of metrics.jsonl reports about freshly sampled windows. Plain, or with one CUDA graph.

The prior is rolled along 50 steps and the posterior along 55, which takes about 2,500 small kernels. Launched one by
one they would cost the host about as much time as several captured gradient steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from learner_proc.captured_step import copy_batch
from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics
from learner_proc.gradient_step import GradientStep
from learner_proc.numbers import Numbers
from learner_proc.replay import Replay
from learner_proc.return_check import ReturnCheck
from learner_proc.saturation import SaturationCheck
from shared.config import OptimizationSettings
from shared.metrics import SAMPLED_VERSION_MEAN
from shared.model.capture import capture

NUM_WINDOWS = 64


class Measurements:
    """Prediction errors, critic values, the actor's limits and the age of the data, on NUM_WINDOWS replayed windows.

    They are measured for each row of metrics.jsonl and not for every gradient step.
    """

    def __init__(self, step: GradientStep, replay: Replay, optimization: OptimizationSettings) -> None:
        self._replay = replay
        # The collector may hold two granted chunks, and granted rows cannot be sampled.
        self.length = min(WINDOW_LENGTH, replay.layout.capacity - 2 * replay.ticks_per_chunk)
        self._diagnostics = Diagnostics(step.spec, step.world_model, step.policy.normaliser, length=self.length)
        self._returns = ReturnCheck(step.world_model, step.policy.normaliser, step.critic, optimization)
        self._saturation = SaturationCheck(step.policy.actor)
        parts = (self._diagnostics, self._returns, self._saturation)
        self.metrics = (*(metric for part in parts for metric in part.metrics), SAMPLED_VERSION_MEAN)

    def __call__(self, *, seed: int) -> Numbers | None:
        """Return the numbers of `metrics`, or None while the replay holds less than one window.

        seed: decides which windows are sampled. The random generator of training is not used, so that measuring does
        not change what is trained. Does not synchronise.
        """
        if self._replay.num_rows < self.length:
            return None
        generator = torch.Generator(self._replay.slab.device).manual_seed(seed)
        return self.measure(self._replay.sample(NUM_WINDOWS, self.length, generator=generator))

    def measure(self, batch: TensorDict) -> Numbers:
        """Return the numbers of `metrics`, measured on a batch [NUM_WINDOWS, length]. Does not synchronise."""
        version = Numbers.of({SAMPLED_VERSION_MEAN: batch["policy_version"].float().mean()})
        features = self._returns.features(batch)
        numbers = [self._diagnostics(batch), self._returns(batch, features), self._saturation(features)]
        return Numbers.join([*numbers, version])


class CapturedMeasurements(Measurements):
    """The same with one CUDA graph. Windows are sampled outside of it, into a fixed batch that the graph reads."""

    def __init__(
        self,
        step: GradientStep,
        replay: Replay,
        optimization: OptimizationSettings,
        *,
        blank: Callable[[int, int], TensorDict],
        capture: Callable[..., tuple[Callable[[], object], Numbers]] = capture,
    ) -> None:
        """Capture the graph. This changes no state, because measuring draws no random number and trains nothing.

        blank: returns a batch of zeros on the device for a number of windows and their length. capture: replaces
        `shared.model.capture.capture`, in tests.
        """
        super().__init__(step, replay, optimization)
        self._batch = blank(NUM_WINDOWS, self.length)
        self._launch, self._numbers = capture(
            lambda: Measurements.measure(self, self._batch), replay.device, shared_process=False
        )

    def measure(self, batch: TensorDict) -> Numbers:
        """Launch the graph on a batch and return the numbers, which the next call overwrites."""
        copy_batch(batch, self._batch)
        self._launch()
        return self._numbers
