"""The learner while it trains. Its loop: take chunks, grant rows, gradient step, publish, log, save.

It has one Python thread, and it never waits for the GPU, except to stay at most two gradient steps ahead of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from learner_proc.captured_step import Update
from learner_proc.gradient_step import GradientStep
from learner_proc.link import CollectorLink
from learner_proc.measurements import Measurements
from learner_proc.metrics_writer import MetricsWriter
from learner_proc.numbers import Numbers
from learner_proc.pacing import Pacing, make_pacing
from learner_proc.publisher import Publisher
from learner_proc.recovery import Recovery
from learner_proc.replay import Replay
from learner_proc.rounds import Rounds
from learner_proc.saver import Saver
from learner_proc.streaming import Chunk
from learner_proc.totals import Counters
from shared import metrics
from shared.geometry import Geometry
from shared.metrics import Metric, Value
from shared.process import Process

IDLE_S = 0.01  # longest sleep while the learner waits for a message
STATUS_S = 0.5  # time between two live statuses
STEPS_AHEAD = 2


class StepQueue:
    """Keeps the host at most STEPS_AHEAD gradient steps ahead of the GPU. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Wait until the GPU has finished all but the newest STEPS_AHEAD - 1 steps."""
        if len(self._events) >= STEPS_AHEAD:
            self._events.popleft().synchronize()  # a blocking event: the thread sleeps and releases the GIL

    def mark(self) -> None:
        """Mark the end of a step on the GPU's stream."""
        if self._is_cuda:
            self._events.append(torch.cuda.Event(blocking=True))
            self._events[-1].record()


class Learner:
    """Owns the replay, the networks and everything else that must survive the collector.

    `WaitingLearner` makes it once a collector streams. `run` waits for the prefill, trains to the last gradient step or
    until it is asked to stop, and saves. It waits for a new collector without limit; launch decides when to end. It is
    one class because it is the order in which the parts of the learner are called.
    """

    def __init__(
        self,
        process: Process,
        *,
        device: torch.device,
        link: CollectorLink,
        replay: Replay,
        pacing: Pacing,
        counters: Counters,
        step: GradientStep,
        update: Update,
        measurements: Measurements,
        writer: MetricsWriter,
        saver: Saver,
        publisher: Publisher,
        recovery: Recovery,
    ) -> None:
        self.link, self.pacing, self.counters, self.publisher = link, pacing, counters, publisher
        self.replay, self._device, self._process, self._progress = replay, device, process, process.progress
        self._options = process.settings.optimization
        self._step, self._update, self.measurements, self._writer = step, update, measurements, writer
        self._saver, self._rounds = saver, Rounds(process, link, pacing, counters, writer, saver)
        self._queue, self._status_at = StepQueue(device), time.monotonic()
        self._recovery, self._replay_ratio = recovery, ratio_so_far(process, replay, pacing, counters)

    def run(self) -> None:
        """Train. Raises: TransportError, FloatingPointError, CheckpointError."""
        self._progress.phase("prefill")
        while not self._is_finished() and not self.may_step():
            self.serve()
            self.idle()
        self._progress.phase("training")
        while not self._is_finished():
            self.serve()
            if self.may_step():
                self.train()
            else:
                self.idle()
                self._rounds.save_if_due(self.request_row, self.publish)
            self.show_status()
        self._end()

    def serve(self) -> None:
        """Take what the collector sent, grant it rows, and send the weights that are ready. Never blocks."""
        for chunk in self.link.poll():
            self.pacing.collected += self.pacing.chunk_frames
            self.take(chunk)
        self.link.flush()
        while self.link.streaming is not None and self._may_grant():
            self.link.streaming.grant(self._version_for_grant())
        self.publisher.flush()
        if self.publisher.take_fault():
            self._recovery.check(self.counters.gradient_steps, not_finite=True)
            self.publish()
        if self.link.streaming is not None:
            self.publisher.collector_streams(self.link.num_welcomed)

    def take(self, chunk: Chunk) -> None:
        """Update the statistics that normalise observations, the metrics, and what is known of the collector."""
        self._step.observe_statistics(self.replay.vectors(chunk.rows, self._device))
        self._writer.add_commit(chunk.commit, newest_version=self.publisher.version, collector=self.link.num_welcomed)
        self.publisher.collector_has(chunk.commit.policy_version)

    def may_step(self) -> bool:
        """Return whether the collected rows allow a gradient step now."""
        return not self._rounds.waiting and self.pacing.may_step(self.replay.num_granted)

    def _may_grant(self) -> bool:
        return not self._rounds.waiting and self.pacing.may_grant(self.replay.num_granted)

    def idle(self) -> None:
        """Wait a moment for the next message. Meanwhile, send weights again that the collector has missed."""
        self._progress.advance()
        self.publisher.republish_if_missed()
        self.link.wait(IDLE_S)

    def train(self) -> None:
        """Make one gradient step; then publish, log and save if that is due.

        Raises: FloatingPointError if no recent gradient was finite, and earlier states did not help.
        """
        self._queue.wait()
        self._writer.add_step(self._update())
        self._queue.mark()
        steps = self.counters.count_gradient_step()
        self.pacing.replayed += self.pacing.step_frames
        self._progress.advance()
        self._recovery.check(steps)
        if steps % self._options.publish_every == 0 and not self.pacing.lockstep:
            self.publish()
        if steps % self._options.log_every == 0:
            self.request_row()
        self._writer.poll()
        self._rounds.save_if_due(self.request_row, self.publish)

    def publish(self) -> None:
        """Send the present weights to the collector as a new version."""
        self.publisher.publish(step=self.counters.gradient_steps, skipped=self._writer.sums.last(metrics.SKIPPED))
        self.counters.policy_version = self.publisher.version
        self._writer.evaluations.published(self.publisher.version, self.counters)

    def request_row(self) -> None:
        """Ask for a row of metrics.jsonl. It is written once its numbers have left the GPU."""
        known = counts(self.link, self.publisher, self._recovery) | {metrics.REPLAY_RATIO: self._replay_ratio()}
        self._writer.request_row(measured(self.measurements, self.replay, step=self.counters.gradient_steps), known)

    def show_status(self) -> None:
        """Update the live status if STATUS_S have passed."""
        if time.monotonic() - self._status_at > STATUS_S:
            self._status_at = time.monotonic()
            status = self._writer.status(
                total_optim_steps=self._options.total_optim_steps,
                replay_ratio=self._replay_ratio(),
                replay_ratio_target=self._options.replay_ratio,
            )
            self._progress.status(status)

    def _version_for_grant(self) -> int:
        """Return the version that the collector must adopt first: the newest one in lockstep, otherwise 0 for any."""
        if not self.pacing.lockstep or not self.pacing.prefilled:
            return 0
        if self.publisher.published_step != self.counters.gradient_steps:
            self.publish()
        return self.publisher.version

    def _is_finished(self) -> bool:
        """Return whether all gradient steps are made or the process was asked to stop."""
        return self._process.stop.requested or self.counters.gradient_steps >= self._options.total_optim_steps

    def _end(self) -> None:
        """Write the last row and the last checkpoint, then close everything. Raises: CheckpointError."""
        self.request_row()
        self._writer.poll(wait=True)
        try:
            self._rounds.save_at_end()
        finally:
            self._progress.phase("stopping")
            for part in (self._writer, self.publisher, self.link):
                part.close()
        steps, asked = self.counters.gradient_steps, self._process.stop.requested
        self._process.log.info("ended", gradient_steps=steps, asked_to_stop=asked)


def measured(measurements: Measurements, replay: Replay, *, step: int) -> Numbers:
    """Return what is measured once for each row, with the counts of what arrived. Does not synchronise.

    step: the number of gradient steps. It is the seed, so that a resumed run measures the same windows as a run that
    was never interrupted.
    """
    windows, arrived = measurements(seed=step), replay.row_bounds.numbers().to(replay.device)
    return arrived if windows is None else Numbers.join([windows, arrived])


def counts(link: CollectorLink, publisher: Publisher, recovery: Recovery) -> dict[Metric, Value]:
    """Return what the parts of the learner have counted on the host, for a row of metrics."""
    return {
        metrics.MESSAGES_DROPPED: link.num_dropped,
        metrics.PUBLICATIONS_SKIPPED: publisher.num_skipped,
        metrics.ROLLBACKS: recovery.num_rollbacks,
    }


def ratio_so_far(process: Process, replay: Replay, pacing: Pacing, counters: Counters) -> Callable[[], float]:
    """Return a function that gives the replay ratio of the run so far."""
    pretrained = make_pacing(process.settings, Geometry.of(process.settings, replay.layout.num_envs)).pretrained
    ratio = partial(counters.replay_ratio, pacing.step_frames, pretrained=pretrained)
    return partial(ratio, eval_in_replay=replay.columns is None)
