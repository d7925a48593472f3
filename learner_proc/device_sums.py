"""Means of what gradient steps measure, computed on the device and brought to the host without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner_proc.numbers import Numbers
from shared.metrics import SKIPPED, Metric


@dataclass(frozen=True)
class Window:
    """What was measured between two rows.

    values: for each metric of a step, its mean over the steps in which it was finite, or None if it never was.
    """

    num_steps: int
    num_skipped: int  # steps without a finite gradient
    values: dict[Metric, float | None]


class DeviceSums:
    """Sums the numbers of every gradient step on the device.

    `request` starts an asynchronous copy of the sums to the host and begins the next window; `result` returns the
    window once the copy has arrived. A value that is not finite is left out of the sum, so that one bad step does not
    spoil the mean of its window.
    """

    def __init__(self, device: torch.device, *, once_per_window: tuple[Metric, ...]) -> None:
        """once_per_window: the metrics that `request` is given, which are not summed."""
        self._device, self._once = device, once_per_window
        self._metrics: tuple[Metric, ...] = ()  # of a step; the first step decides them
        self._sums, self._pinned = self._buffers()
        self._last: Tensor | None = None  # what the newest step measured
        self._requested_steps: int | None = None  # None while no window is requested
        self._event: torch.cuda.Event | None = None
        self.num_steps = 0  # in the present window

    def add(self, numbers: Numbers) -> None:
        """Add what one gradient step measured. Every step measures the same metrics."""
        if not self._metrics:
            self._metrics = numbers.metrics
            self._sums, self._pinned = self._buffers()
        assert numbers.metrics == self._metrics, numbers.metrics
        self._last = numbers.values
        finite = numbers.values.isfinite()
        self._sums += torch.stack([torch.where(finite, numbers.values, 0.0), finite.float()])
        self.num_steps += 1

    def last(self, metric: Metric) -> Tensor | None:
        """Return what the newest step measured, () on the device, or None before the first step. Does not wait."""
        return None if self._last is None else self._last[self._metrics.index(metric)]

    def request(self, measured: Numbers | None) -> None:
        """End the present window. Call `result(wait=True)` first if a window is still requested.

        measured: the numbers of the last metrics of `once_per_window`; the others, or all if it is None, become None.
        """
        assert self._requested_steps is None, "the window requested before was not taken"
        parts = [self._sums.flatten()]
        given = () if measured is None else measured.metrics
        unknown = len(self._once) - len(given)
        assert given == self._once[unknown:], given
        if unknown:
            parts.append(self._sums.new_full((unknown,), float("nan")))
        if measured is not None:
            parts.append(measured.values)
        self._pinned.copy_(torch.cat(parts), non_blocking=True)
        if self._sums.is_cuda:
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        self._requested_steps = self.num_steps
        self._sums.zero_()
        self.num_steps = 0

    def result(self, *, wait: bool = False) -> Window | None:
        """Return the requested window, or None if none is requested or its numbers are still on their way.

        wait: wait for the numbers.
        """
        if self._requested_steps is None:
            return None
        if self._event is not None:
            if not wait and not self._event.query():
                return None
            self._event.synchronize()
        num_steps, self._requested_steps, self._event = self._requested_steps, None, None
        width, values = len(self._metrics), self._pinned.tolist()
        sums = dict(zip(self._metrics, values[:width], strict=True))
        counts = dict(zip(self._metrics, values[width : 2 * width], strict=True))
        means = {metric: total / counts[metric] if counts[metric] else None for metric, total in sums.items()}
        once = dict(zip(self._once, values[2 * width :], strict=True))
        return Window(num_steps, round(sums[SKIPPED]) if sums else 0, {**means, **once})

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return zeros (2, num_metrics) on the device, sums of finite values above their counts, and the host's copy.

        The copy has the same numbers in one row, followed by those of `once_per_window`.
        """
        sums = torch.zeros(2, len(self._metrics), device=self._device)
        return sums, torch.zeros(sums.numel() + len(self._once), pin_memory=self._device.type == "cuda")
