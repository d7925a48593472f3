"""A copier whose copies are done only when the test finishes them, as if a GPU were busy."""

from __future__ import annotations

from collections.abc import Iterable

from collector_proc.copies import Pair


class LateCopy:
    """Reads its sources only when it finishes, so that a write to them before that shows in the targets."""

    def __init__(self, copier: LateCopier, pairs: Iterable[Pair]) -> None:
        self._copier, self._pairs, self.finished = copier, list(pairs), False

    def finish(self) -> None:
        for target, source in [] if self.finished else self._pairs:
            target.copy_(source)
        self.finished = True

    def done(self) -> bool:
        return self.finished

    def wait(self) -> None:
        self._copier.num_host_waits += not self.finished
        self._copier.finish()

    def block_stream(self) -> None:
        self._copier.num_blocked_streams += not self.finished
        self.finish()  # work that is queued after this call finds the copy done


class LateCopier:
    """Asks for two buffers, as the copier of a GPU does.

    num_host_waits, num_blocked_streams: how often the host or the stream had to wait for copies that were not done.
    """

    num_buffers = 2

    def __init__(self) -> None:
        self.copies: list[LateCopy] = []
        self.num_host_waits = self.num_blocked_streams = 0

    @property
    def num_pending(self) -> int:
        return sum(not copy.finished for copy in self.copies)

    def start(self, pairs: Iterable[Pair]) -> LateCopy:
        self.copies.append(LateCopy(self, pairs))
        return self.copies[-1]

    def finish(self) -> None:
        """Finish all copies, in the order in which they were started."""
        for copy in self.copies:
            copy.finish()
