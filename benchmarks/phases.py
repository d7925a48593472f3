"""Where the time of a gradient step goes: its named parts are timed from outside, the sources stay as they are."""

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
    "_learn_behavior": "heads, returns and their slopes",
    "_heads.weight_gradients": "critic backward",
}
BACKWARDS = {"_learn_behavior": "imagination and actor backward", None: "world model backward"}
OPTIMISERS = "optimisers"
REST = "rest"


class PhaseClock:
    """Adds up seconds by phase, inner phases taken out of outer ones; on a GPU a phase ends when the device is done."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device = device
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[tuple[str, str | None]] = []  # phases under way, each with the part it belongs to
        self._since = 0.0

    def timed(self, phase: str, function: Callable[..., Any], part: str | None = None) -> Callable[..., Any]:
        """`function`, its own time counted under `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._within(phase, part, lambda: function(*args, **kwargs))

        return call

    def timed_backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.autograd.grad`, counted as the backward of the part that calls it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            phase, part = self._running[-1]
            # what traces a function calls it wherever it is compiled: in no part's backward
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
        """What went by since the last change belongs to the innermost phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.now()
        if self._running:
            self.seconds[self._running[-1][0]] += now - self._since
        self._since = now


def phase_ms(step: GradientStep, batch: TensorDict, *, repetitions: int, clock: str) -> dict[str, float]:
    """Median milliseconds of every phase over some steps, after two that are not counted; `clock` is cpu or wall.

    The step keeps its clocks. Raises: AttributeError if the step no longer has these parts.
    """
    assert batch.device is not None
    watch = PhaseClock(batch.device, clock)
    parts: Any = step  # its private parts, by name
    for name, phase in PARTS.items():
        *path, last = name.split(".")
        owner = attrgetter(*path)(parts) if path else parts
        setattr(owner, last, watch.timed(phase, getattr(owner, last), name))
    for updater in parts._updaters.values():
        updater.apply = watch.timed(OPTIMISERS, updater.apply)
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
