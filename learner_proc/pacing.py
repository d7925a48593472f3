"""Replay ratio and back-pressure: when a gradient step may run and when a chunk may be granted.

With c collected rows, g granted chunks of C rows, r replayed rows, S rows a step and ratio R:

    step  iff  r < R * c
    grant iff  R * (c + g * C) < r + 2 * R * C + S        and fewer than two chunks are granted

An exhaustive search over small settings finds no state in which neither side can move (tests/learner_proc/test_pacing.py).
Two natural rules that look alike deadlock: "step iff r + S <= R * c" in most settings.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GRANTED = 2


@dataclass
class Pacing:
    """The ledger since the run started or was resumed. Units: rows (agent steps), all environments together.

    Before `prefill` rows are collected, grants are free and no step runs. `ratio` None lets both sides run free.
    """

    chunk_frames: int
    step_frames: int
    ratio: float | None
    prefill: int
    collected: int = 0
    replayed: int = 0
    lockstep: bool = False  # one chunk, then the steps it allows, then the next chunk

    @property
    def prefilled(self) -> bool:
        return self.collected >= self.prefill

    def may_step(self, granted: int = 0) -> bool:
        """granted: chunks granted and not yet committed."""
        if not self.prefilled or self.collected == 0 or (self.lockstep and granted > 0):
            return False
        return self.ratio is None or self.replayed < self.ratio * self.collected

    def may_grant(self, granted: int) -> bool:
        """granted: chunks granted and not yet committed."""
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
