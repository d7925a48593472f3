"""Rounds of lockstep: what makes a resumed run equal, bit for bit, to one that was never interrupted.

A round is the gradient steps between two checkpoints, `checkpoint.every_steps` of them. Every round begins in the same
way, whether the learner has just saved the checkpoint or has just loaded it:

    save | new weights are published | the collector begins again: simulator, episodes, random numbers | first chunk ...
    load | new weights are published | a collector begins: simulator, episodes, random numbers         | first chunk ...

So the checkpoint needs no state of the simulator. The seeds of a round follow from its number. A run in lockstep saves
at no other time, except after its last gradient step: a checkpoint in the middle of a round could not be continued
exactly. The steps since the last checkpoint are lost if the run is stopped, and a resume makes the same steps again.
"""

from __future__ import annotations

from collections.abc import Callable

from learner_proc.link import CollectorLink
from learner_proc.metrics_writer import MetricsWriter
from learner_proc.pacing import Pacing
from learner_proc.saver import Saver
from learner_proc.totals import Counters
from shared.checkpoints import CheckpointError
from shared.process import Process


class Rounds:
    """Saves checkpoints: by the clock in async mode; in lockstep at the end of each round, where all begins again."""

    def __init__(
        self,
        process: Process,
        link: CollectorLink,
        pacing: Pacing,
        counters: Counters,
        writer: MetricsWriter,
        saver: Saver,
    ) -> None:
        self._settings, self._log, self._save_now = process.settings, process.log, process.save
        self._progress = process.progress
        self._link, self._pacing, self._counters = link, pacing, counters
        self._writer, self._saver = writer, saver
        self._ended_at = counters.gradient_steps  # the step after which the present round began
        self._left = -1  # number of the collector that was asked to begin again, as `num_welcomed` counts

    @property
    def waiting(self) -> bool:
        """Whether no collector has begun the round of lockstep yet. Then no step is made and no chunk is granted."""
        left = self._link.streaming is None or self._link.num_welcomed == self._left
        return self._pacing.lockstep and left

    def save_if_due(self, request_row: Callable[[], None], publish: Callable[[], None]) -> None:
        """Save if a checkpoint is due. In lockstep, also begin the next round.

        request_row, publish: ask for a row of metrics; publish the present weights.
        """
        if not self._pacing.lockstep:
            self._saver.save_if_due()
        elif self._is_end() and self._counters.gradient_steps != self._ended_at:
            self._ended_at = self._counters.gradient_steps
            self._save_now.take()  # a request to save is answered now
            request_row()
            self._writer.poll(wait=True)
            self._close()
            self._try_to_save()
            self._writer.begin_round()
            publish()
            self._left = self._link.num_welcomed
            self._link.begin_round(self._counters.rounds)

    def save_at_end(self) -> None:
        """Write the last checkpoint, unless a run in lockstep could not be continued exactly from it.

        Raises: CheckpointError.
        """
        if not self._pacing.lockstep:
            self._saver.save()
        elif self._counters.gradient_steps < self._settings.optimization.total_optim_steps:
            self._log.info("a resume repeats the steps since the last checkpoint, with the same result")
        elif not self._is_end() or self._saver.saved_step != self._counters.gradient_steps:
            self._close()
            self._saver.save()

    def _try_to_save(self) -> None:
        """Write a checkpoint and wait for it. If it fails, log a warning: training must go on."""
        try:
            self._saver.save()
        except CheckpointError as error:
            self._log.warning("a checkpoint failed", reason=str(error))
            self._progress.phase("training")

    def _is_end(self) -> bool:
        """Return whether the gradient step that was made last ends a round."""
        return self._counters.gradient_steps % self._settings.checkpoint.every_steps == 0

    def _close(self) -> None:
        """Prepare the counters for a checkpoint after which the next round begins."""
        self._counters.rounds += 1
        self._pacing.save_to(self._counters)
