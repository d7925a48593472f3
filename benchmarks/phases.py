"""The time of each phase of a gradient step. The step's methods are wrapped in timers; its sources do not change."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDict

from learner_proc.gradient_step import GradientStep

PARTS = {
    "_learn_model": "world model forward",
    "_imagine": "imagination forward",
    # the inner one first: the outer one is replaced by a function, which has no attributes
    "_behavior_gradients.heads.weight_gradients": "critic backward",
    "_behavior_gradients": "heads, returns and their slopes",
}
BACKWARDS = {"_behavior_gradients": "imagination and actor backward", None: "world model backward"}
OPTIMISERS = "optimisers"
REST = "rest"


class PhaseClock:
    """Adds up seconds by phase. The time of an inner phase does not count for the outer one.

    On a GPU a phase ends when the device has finished its work.
    """

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device = device
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[tuple[str, str | None]] = []  # the running phases, each with the part that it belongs to
        self._since = 0.0

    def timed(self, phase: str, function: Callable[..., Any], part: str | None = None) -> Callable[..., Any]:
        """Return `function` with its time counted as `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._within(phase, part, lambda: function(*args, **kwargs))

        return call

    def timed_backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `torch.autograd.grad` with its time counted as the backward of the part that calls it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            phase, part = self._running[-1]
            # the compiler calls it while tracing, outside of every part; that time counts for the running phase
            return self._within(BACKWARDS.get(part, phase), part, lambda: function(*args, **kwargs))

        return call

    def _within(self, phase: str, part: str | None, call: Callable[[], Any]) -> Any:
        self._charge()
        self._running.append((phase, part))
        try:
            return call()
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        """Add the time since the last change to the innermost phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.now()
        if self._running:
            self.seconds[self._running[-1][0]] += now - self._since
        self._since = now


def phase_ms(step: GradientStep, batch: TensorDict, *, repetitions: int, clock: str) -> dict[str, float]:
    """Return the median milliseconds of every phase, after two steps that are not counted; `clock` is cpu or wall.

    The step keeps the timers. Raises: AttributeError if the step has no method of such a name.
    """
    assert batch.device is not None
    watch = PhaseClock(batch.device, clock)
    parts: Any = step  # Any, because the parts are private
    for name, phase in PARTS.items():
        *path, last = name.split(".")
        owner = attrgetter(".".join(path))(parts) if path else parts
        setattr(owner, last, watch.timed(phase, getattr(owner, last), name))
    for optimiser in parts._optimisers.values():
        optimiser.apply = watch.timed(OPTIMISERS, optimiser.apply)
    taken: defaultdict[str, list[float]] = defaultdict(list)
    whole = watch.timed(REST, step)
    with patch.object(torch.autograd, "grad", watch.timed_backward(torch.autograd.grad)):
        for turn in range(repetitions + 2):
            watch.seconds.clear()
            whole(batch)
            if turn >= 2:
                for phase, seconds in watch.seconds.items():
                    taken[phase].append(1e3 * seconds)
    return {phase: statistics.median(values) for phase, values in taken.items()}
