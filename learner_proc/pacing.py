"""The replay ratio: when a gradient step may run, and when a chunk may be granted to the collector.

The rules use c collected rows, P rows of the prefill, g granted chunks of C rows each, r replayed rows, S rows per
step, the ratio R, and H rows that are replayed on the prefill alone:

    step  iff  r < H + R * (c - P)
    grant iff  H + R * (c - P + g * C) < r + 2 * R * C + S        and fewer than two chunks are granted

As in the code of Dreamer V1, a fixed number of gradient steps follows the prefill, and the ratio applies to what is
collected afterwards. Some other rules lead to a deadlock, for example "step iff r + S <= R * c".
tests/learner_proc/test_pacing.py searches all states of many small settings and finds none in which neither side can
continue.
"""

from __future__ import annotations

from dataclasses import dataclass

from learner_proc.totals import Counters
from shared.config import Settings
from shared.geometry import Geometry

LEDGER = ("collected", "replayed", "prefill", "pretrained", "ratio")  # the fields that a checkpoint of lockstep has
MAX_GRANTED = 2  # chunks: the collector fills one while the other is on its way


@dataclass
class Pacing:
    """Counts collected and replayed rows since the process started, and decides which side may continue.

    Until `prefill` rows are collected, no step runs and grants are not limited. If `ratio` is None, there is no replay
    ratio: steps always run, and up to MAX_GRANTED chunks are granted.

    pretrained: H, see `rows_on_prefill`.
    Units: rows of single environments, that is, agent steps.
    """

    chunk_frames: int
    step_frames: int
    ratio: float | None
    prefill: int
    pretrained: float = 0.0
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
        return self.ratio is None or self.replayed < self._allowed(self.ratio, self.collected)

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
        ahead = 2 * self.ratio * self.chunk_frames + self.step_frames
        return self._allowed(self.ratio, promised) < self.replayed + ahead

    def _allowed(self, ratio: float, collected: int) -> float:
        """Return the rows that may be replayed once this many are collected."""
        return self.pretrained + ratio * (collected - self.prefill)

    def save_to(self, counters: Counters) -> None:
        """Note the ledger in the counters, which are saved in checkpoints."""
        ledger = (self.collected, self.replayed, self.prefill, self.pretrained, self.ratio)
        counters.paced = dict(zip(LEDGER, ledger, strict=True))

    def resume_from(self, counters: Counters) -> None:
        """Continue the ledger of a run in lockstep, unless its replay ratio was changed."""
        if self.lockstep and counters.paced.get("ratio") == self.ratio:
            for name, value in counters.paced.items():
                setattr(self, name, value)


def rows_on_prefill(steps: int, *, step_frames: int, ratio: float | None, prefill: int) -> float:
    """Return H, the rows that `steps` gradient steps replay before any row after the prefill is required.

    It is at most what the ratio gives for the prefill, so that a small prefill is not replayed more often than that.
    """
    return 0.0 if ratio is None else min(float(steps * step_frames), ratio * prefill)


def make_pacing(settings: Settings, geometry: Geometry, *, gradient_steps: int = 0) -> Pacing:
    """Return the pacing of a run that has made some gradient steps already, before rows are restored."""
    optimization, prefill = settings.optimization, geometry.replayed_prefill
    pretrained = rows_on_prefill(
        max(0, optimization.pretrain_steps - gradient_steps),
        step_frames=geometry.frames_per_step,
        ratio=optimization.replay_ratio,
        prefill=prefill,
    )
    return Pacing(
        geometry.replayed_per_chunk,
        geometry.frames_per_step,
        optimization.replay_ratio,
        prefill,
        pretrained,
        lockstep=settings.collector.mode == "lockstep",
    )
