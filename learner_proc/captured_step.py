"""One call, one update: sample, gradient step, metrics. Plain, or as one CUDA graph that the host launches at once.

At 2,500 frames a gradient step is thousands of kernels of a few microseconds; launched one by one they leave the GPU waiting
for Python. Captured, the whole step is one launch. Captured code reads and writes fixed addresses, so everything that
changes between two updates does so in place: parameters, moments, loss scales, the sampler's bounds, random states.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict

from learner_proc.gradient_step import GradientStep
from learner_proc.numbers import Numbers
from learner_proc.replay import Replay

Update = Callable[[], Numbers]  # what one update measured; the values stay valid until the next update
WARM_UPS = 3  # steps before capture: everything that is made lazily or compiled is there after two


class SampledStep:
    """Sample, then step: what the CPU runs, and what the captured update is tested against."""

    def __init__(self, step: GradientStep, replay: Replay, *, num_sequences: int, length: int) -> None:
        self._step, self._replay, self._sizes = step, replay, (num_sequences, length)

    def __call__(self) -> Numbers:
        return self._step(self._replay.sample(*self._sizes))


class CapturedStep:
    """The same as one CUDA graph.

    Constructing it warms up and captures, which trains on whatever lies in the replay: the caller saves the learner's and
    the random states before and writes them back, in place, after. A replay in host memory is sampled outside the graph,
    into a fixed batch that the graph reads.
    """

    def __init__(
        self, step: GradientStep, replay: Replay, *, num_sequences: int, length: int, blank: TensorDict
    ) -> None:
        """blank: a batch of the right shapes on the device; what a replay in host memory is copied into."""
        self._replay, self._sizes = replay, (num_sequences, length)
        self._batch = None if replay.slab.is_cuda else blank
        self._graph = torch.cuda.CUDAGraph()
        if self._batch is None:
            self._graph.register_generator_state(replay.generator)
        stream = torch.cuda.Stream(replay.device)
        stream.wait_stream(torch.cuda.current_stream(replay.device))

        def update() -> Numbers:
            return step(replay.draw(num_sequences, length) if self._batch is None else self._batch)

        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                update()
        stream.synchronize()
        torch.cuda.empty_cache()  # the graph takes memory of its own; what the warm-up took would lie idle beside it
        began = time.monotonic()
        gc.collect()
        gc.disable()  # a finaliser that frees memory of the GPU would break the capture
        try:
            with torch.compiler.set_stance("fail_on_recompile"), torch.cuda.graph(self._graph, stream=stream):
                self._numbers = update()
        finally:
            gc.enable()
        torch.cuda.current_stream(replay.device).wait_stream(stream)
        self.capture_s = time.monotonic() - began

    def __call__(self) -> Numbers:
        if self._batch is not None:
            _copy(self._replay.sample(*self._sizes), self._batch)
        self._graph.replay()
        return self._numbers


def _copy(source: TensorDict, target: TensorDict) -> None:
    """Leaf by leaf into fixed addresses, on the current stream."""
    for key in target.keys(include_nested=True, leaves_only=True):
        target.get(key).copy_(source.get(key), non_blocking=True)
