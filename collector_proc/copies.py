"""Copies that run beside the simulation: on a GPU on a CUDA stream of their own, on a CPU directly.

While one buffer is copied, the next rows are gathered in the other one:

    current stream   | tick tick tick | tick tick tick | tick ...     gathers into buffer 0, buffer 1, buffer 0 ...
    side stream                       | copy buffer 0 |
                                                      ^ an event is recorded here; once it has passed, the copy is done

In host memory a copy is complete when it returns, so one buffer is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]  # target and source of a copy, equal in shape and dtype


class Copy(Protocol):
    """A group of copies that were started together. Do not write to their sources before they are done."""

    def done(self) -> bool:
        """Return whether every target is complete. This never blocks."""
        ...

    def wait(self) -> None:
        """Block the host until every target is complete."""
        ...

    def block_stream(self) -> None:
        """Make the current stream wait: work that is queued on it after this call runs after the copies.

        The host does not block.
        """
        ...


class Copier(Protocol):
    """Starts copies that run after everything that was queued on the current stream before."""

    num_buffers: int  # how many buffers the caller needs in order to fill one while another is copied

    def start(self, pairs: Iterable[Pair]) -> Copy:
        """Start a copy of each pair, from its source to its target."""
        ...


class CompletedCopy:
    """A copy that is already done."""

    def done(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def block_stream(self) -> None:
        """Return at once."""


class DirectCopier:
    """Copies from host memory to host memory. Every copy is done when `start` returns."""

    num_buffers = 1

    def start(self, pairs: Iterable[Pair]) -> Copy:
        """Copy each pair and return when all are done."""
        for target, source in pairs:
            target.copy_(source)
        return CompletedCopy()


class StreamCopy:
    """Copies on CUDA streams.

    events: one per stream, recorded after the copies. device: the GPU whose current stream `block_stream` blocks.
    """

    def __init__(self, events: Sequence[torch.cuda.Event], device: torch.device) -> None:
        self._events, self._device = events, device

    def done(self) -> bool:
        """Return whether every stream has finished its copies."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Block the host until every stream has finished its copies."""
        for event in self._events:
            event.synchronize()

    def block_stream(self) -> None:
        """Make the GPU's current stream wait for the copies."""
        stream = torch.cuda.current_stream(self._device)
        for event in self._events:
            stream.wait_event(event)


class StreamCopier:
    """Copies on a side stream of a GPU. Host memory among the sources or targets must be page-locked.

    device: the GPU of the sources, or of the targets if the sources are in host memory. other: a second GPU, if the
    targets are there.
    """

    num_buffers = 2

    def __init__(self, device: torch.device, other: torch.device | None = None) -> None:
        self._device, self._other = device, other
        self._stream = torch.cuda.Stream(device)

    def start(self, pairs: Iterable[Pair]) -> Copy:
        """Queue the copies on the side stream and return without waiting for them."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        streams = [self._stream]
        if self._other is not None:  # torch ends a copy between GPUs on the current stream of the target's GPU
            streams.append(torch.cuda.current_stream(self._other))
        events = [torch.cuda.Event() for _ in streams]
        for event, stream in zip(events, streams, strict=True):
            event.record(stream)
        return StreamCopy(events, self._device)


def copier_between(device: torch.device, target: torch.device | None) -> Copier:
    """Return a copier from the acting device to the target's device; None means host memory."""
    gpus = [d for d in (device, target) if d is not None and d.type == "cuda"]
    if not gpus:
        return DirectCopier()
    other = [d for d in gpus[1:] if d != gpus[0]]
    return StreamCopier(gpus[0], *other)


class DoubleBuffer(Generic[T]):
    """Equal buffers that are filled and copied out in turn. `current` is the one to fill.

    There are two, or one if the copier needs no second one (`Copier.num_buffers`).
    """

    def __init__(self, copier: Copier, make: Callable[[], T]) -> None:
        self._copier = copier
        self.buffers = [make() for _ in range(copier.num_buffers)]
        self._copies: list[Copy] = [CompletedCopy() for _ in self.buffers]  # the last copy out of each buffer
        self._index = 0

    @property
    def current(self) -> T:
        """Return the buffer to fill."""
        return self.buffers[self._index]

    def send(self, pairs: Iterable[Pair]) -> Copy:
        """Start copies out of the current buffer, and make the other buffer current.

        Writes to the new current buffer run after the last copy out of it.
        """
        copy = self._copies[self._index] = self._copier.start(pairs)
        self._index = (self._index + 1) % len(self.buffers)
        self._copies[self._index].block_stream()
        return copy
