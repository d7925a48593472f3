"""Means of what gradient steps measure, computed on the device and brought to the host without waiting for it."""

from __future__ import annotations

from collections import deque
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
        self._marks, self._marked_steps = _Marks(device), 0  # steps of the present window up to the last mark

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

    @property
    def skipped_in_a_row(self) -> int:
        """The newest steps that were all skipped, in whole spans between two marks, as of the last `poll_marks`."""
        return self._marks.skipped_in_a_row

    def mark(self) -> None:
        """Start to copy to the host how many of the steps since the last mark were skipped."""
        if self.num_steps > self._marked_steps:
            skipped = self._sums[0, self._metrics.index(SKIPPED)]
            if self._marks.add(skipped, self.num_steps - self._marked_steps, first=self._marked_steps == 0):
                self._marked_steps = self.num_steps

    def poll_marks(self) -> int:
        """Return `skipped_in_a_row` as far as the copies have arrived. Never waits."""
        return self._marks.poll()

    def forget_marks(self) -> None:
        """Count `skipped_in_a_row` from the next step on."""
        self.mark()
        self._marks.forget()

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
        self.mark()
        self._sums.zero_()
        self.num_steps = self._marked_steps = 0

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


class _Marks:
    """Copies of the number of skipped steps that are on their way to the host, and what the earlier ones showed."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # The training loop is at most two steps ahead of the GPU, so copies never wait for a place.
        self._free = deque(torch.zeros(1, pin_memory=self._is_cuda) for _ in range(8))
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None, int, bool]] = deque()
        self._before = 0.0  # skipped steps of the window up to the mark that arrived last
        self._num_forgotten = 0  # marks on their way that no longer count
        self.skipped_in_a_row = 0

    def add(self, skipped: Tensor, num_steps: int, *, first: bool) -> bool:
        """Start a copy; return whether there was a place for it.

        skipped: () of the window so far. num_steps: since the last mark. first: it is the first mark of its window.
        """
        if not self._free:
            return False
        place, event = self._free.popleft(), None
        place.copy_(skipped, non_blocking=True)
        if self._is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._sent.append((place, event, num_steps, first))
        return True

    def poll(self) -> int:
        """Read the copies that have arrived, and return `skipped_in_a_row`."""
        while self._sent and (self._sent[0][1] is None or self._sent[0][1].query()):
            place, _, num_steps, first = self._sent.popleft()
            (value,) = place.tolist()
            self._free.append(place)
            skipped, self._before = value - (0.0 if first else self._before), value
            if self._num_forgotten:
                self._num_forgotten -= 1
            else:
                self.skipped_in_a_row = self.skipped_in_a_row + num_steps if skipped >= num_steps else 0
        return self.skipped_in_a_row

    def forget(self) -> None:
        """Begin to count again after the marks that are on their way."""
        self._num_forgotten, self.skipped_in_a_row = len(self._sent), 0
