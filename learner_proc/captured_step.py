"""One call is one update: sample a batch, make a gradient step, return its metrics. Plain, or as one CUDA graph.

With 2,500 frames a gradient step is thousands of kernels of a few microseconds each. Launched one by one, they leave
the GPU waiting for Python. As a graph, the whole step is one launch. A graph reads and writes fixed addresses, so
everything that changes between two updates changes in place: parameters, moments, loss scales, the sampler's bounds,
random states.
"""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDict

from learner_proc.gradient_step import GradientStep
from learner_proc.numbers import Numbers
from learner_proc.replay import Replay
from shared.model.capture import capture

Update = Callable[[], Numbers]  # returns what one update measured; the values stay valid until the next update


class SampledStep:
    """A sample, then a gradient step on it. This is what runs without CUDA graphs."""

    def __init__(self, step: GradientStep, replay: Replay, *, num_sequences: int, length: int) -> None:
        self._step, self._replay, self._sizes = step, replay, (num_sequences, length)

    def __call__(self) -> Numbers:
        """Make one gradient step and return its metrics."""
        return self._step(self._replay.sample(*self._sizes))


class CapturedStep:
    """The same as one CUDA graph.

    The constructor runs the step several times, which trains on the present content of the replay. The caller saves the
    learner's state and the random states before, and writes them back in place afterwards. A replay in host memory is
    sampled outside the graph, into a fixed batch that the graph reads.
    """

    def __init__(
        self, step: GradientStep, replay: Replay, *, num_sequences: int, length: int, blank: TensorDict
    ) -> None:
        """blank: a batch of the right shapes on the device. Samples of a replay in host memory are copied into it."""
        self._replay, self._sizes = replay, (num_sequences, length)
        self._batch = None if replay.slab.is_cuda else blank

        def update() -> Numbers:
            return step(replay.draw(num_sequences, length) if self._batch is None else self._batch)

        generators = [replay.generator] if self._batch is None else []
        self._launch, self._numbers = capture(update, replay.device, shared_process=False, generators=generators)

    def __call__(self) -> Numbers:
        """Launch the graph and return the metrics, which the next call overwrites."""
        if self._batch is not None:
            copy_batch(self._replay.sample(*self._sizes), self._batch)
        self._launch()
        return self._numbers


def copy_batch(source: TensorDict, target: TensorDict) -> None:
    """Copy every leaf into its fixed address, on the current stream."""
    for key in target.keys(include_nested=True, leaves_only=True):
        target.get(key).copy_(source.get(key), non_blocking=True)
