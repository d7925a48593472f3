"""The replay ratio: when a gradient step may run, and when a chunk may be granted to the collector.

The rules use c collected rows, g granted chunks of C rows each, r replayed rows, S rows per step, and the ratio R:

    step  iff  r < R * c
    grant iff  R * (c + g * C) < r + 2 * R * C + S        and fewer than two chunks are granted

Some other rules lead to a deadlock, for example "step iff r + S <= R * c". tests/learner_proc/test_pacing.py searches
all states of many small settings and finds none in which neither side can continue.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GRANTED = 2  # chunks: the collector fills one while the other is on its way


@dataclass
class Pacing:
    """Counts collected and replayed rows since the process started, and decides which side may continue.

    Until `prefill` rows are collected, no step runs and grants are not limited. If `ratio` is None, there is no replay
    ratio: steps always run, and up to MAX_GRANTED chunks are granted.

    Units: rows of single environments, that is, agent steps.
    """

    chunk_frames: int
    step_frames: int
    ratio: float | None
    prefill: int
    collected: int = 0
    replayed: int = 0
    lockstep: bool = False  # alternate: one chunk, then the steps that it allows, then the next chunk

    @property
    def prefilled(self) -> bool:
        """Return whether the prefill is complete."""
        return self.collected >= self.prefill

    def may_step(self, granted: int = 0) -> bool:
        """Return whether a gradient step may run. granted: chunks that are granted and not yet committed."""
        if not self.prefilled or self.collected == 0 or (self.lockstep and granted > 0):
            return False
        return self.ratio is None or self.replayed < self.ratio * self.collected

    def may_grant(self, granted: int) -> bool:
        """Return whether one more chunk may be granted. granted: chunks that are granted and not yet committed."""
        if self.lockstep:
            return granted == 0 and not self.may_step()
        promised = self.collected + granted * self.chunk_frames
        if promised < self.prefill:
            return True
        if granted >= MAX_GRANTED:
            return False
        if self.ratio is None:
            return True
        return self.ratio * promised < self.replayed + 2 * self.ratio * self.chunk_frames + self.step_frames
