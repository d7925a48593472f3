"""The learner until it trains: it waits for a collector, lets it fill the replay, and meanwhile builds the networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from learner_proc import checkpoint
from learner_proc.evaluation import EvaluationLog
from learner_proc.gradient_step import GradientStep
from learner_proc.handshake import Handshake, SharedReplay
from learner_proc.learn import IDLE_S, Learner
from learner_proc.link import CollectorLink
from learner_proc.measurements import Measurements
from learner_proc.metrics_writer import MetricsWriter, cut_after
from learner_proc.pacing import Pacing, make_pacing
from learner_proc.publisher import Publisher
from learner_proc.recovery import Recovery
from learner_proc.replay import Replay
from learner_proc.replay_files import load_replay
from learner_proc.row_bounds import RowBounds
from learner_proc.saver import Saver, restore
from learner_proc.signs import Signs
from learner_proc.startup import allocate_replay, build_gradient_step, build_measurements, build_step
from learner_proc.streaming import Chunk
from learner_proc.totals import Counters
from learner_proc.warning_lines import WarningLines
from shared import metrics
from shared.checkpoints import Checkpoint, settle
from shared.errors import TransportError
from shared.evaluation import EvaluationPlan
from shared.geometry import Geometry
from shared.gpu import describe_gpu
from shared.process import Process
from shared.run_folder import RunFolder
from shared.socket_folder import WEIGHTS_SOCKET, obtain_secret
from shared.stream import StreamSpec

# A collector may take this many times deadlines.start_s until its self-test arrives. It is more than 1, so that launch
# notices a collector that hangs before the learner refuses it. It is less than the 2 of `_wait_for_collector`.
SELF_TEST_STARTS = 1.5


class WaitingLearner:
    """Opens the sockets, waits for a collector, and builds the learner that trains.

    The replay is allocated at the first hello and, in a resumed run, filled from the checkpoint. The collector fills
    the rest while the networks are compiled.
    """

    def __init__(self, process: Process, *, device: torch.device, resume: bool) -> None:
        """resume: continue from the newest checkpoint. Raises: SettingError if there is none."""
        settings = process.settings
        self._process, self._device, self._geometry = process, device, Geometry.of(settings)
        self._checkpoint, self._saved = load_saved(process) if resume else (None, {})
        self.counters = Counters(**self._saved.get("counters", {}))
        self.pacing = make_pacing(settings, self._geometry, gradient_steps=self.counters.gradient_steps)
        allocate = partial(
            allocate_and_restore,
            process,
            self._geometry,
            device=device,
            pacing=self.pacing,
            counters=self.counters,
            saved=self._checkpoint,
            row_bounds=self._saved.get("row_bounds", {}),
        )
        self.link = open_link(process, self._geometry, self.counters, self.pacing, allocate)
        self._early: list[Chunk] = []  # chunks that were committed before the networks existed

    def run(self) -> Learner | None:
        """Return the learner that trains, or None if the process was asked to stop before a collector streamed.

        Raises: TransportError if no collector streams in time; SettingError if the checkpoint does not fit the
        settings.
        """
        self._process.progress.phase("hello")
        shared = self._wait_for_collector()
        return None if shared is None else self.build(shared)

    def _wait_for_collector(self) -> SharedReplay | None:
        """Serve until a collector streams. Return the replay, or None if the process was asked to stop.

        The deadline starts again with every collector that sends a valid hello. It is twice `deadlines.start_s`,
        because the simulator may take `start_s` to start, and hello and self-test may take as long again.
        """
        deadline_s, num_welcomed, end = 2 * self._process.settings.deadlines.start_s, -1, 0.0
        while not self._process.stop.requested:
            if self.link.streaming is not None:
                return self.link.streaming.shared
            if self.link.num_welcomed != num_welcomed:
                num_welcomed, end = self.link.num_welcomed, time.monotonic() + deadline_s
            if time.monotonic() > end:
                raise TransportError(
                    f"no collector has passed its self-test for {deadline_s:.0f} s, and {num_welcomed} sent a valid "
                    "hello; expected one that streams; look at logs/collector.out, or raise deadlines.start_s"
                )
            self.serve()
            self._process.progress.advance()
            self.link.wait(IDLE_S)
        return None

    def serve(self) -> None:
        """Take what the collector sent and grant it rows. Never blocks."""
        for chunk in self.link.poll():
            self.pacing.collected += self.pacing.chunk_frames
            self._early.append(chunk)
        self.link.flush()
        streaming = self.link.streaming
        while streaming is not None and self.pacing.may_grant(streaming.shared.replay.num_granted):
            streaming.grant()

    def build(self, shared: SharedReplay) -> Learner:
        """Build and compile the networks, and return the learner that trains."""
        process, began = self._process, time.monotonic()
        process.progress.phase("compiling")
        self.serve()  # grant the whole prefill now, since no grant is sent while the networks are compiled
        step = build_gradient_step(shared.spec, process.settings, device=self._device)
        update = build_step(step, shared.replay, process.settings, self._geometry, device=self._device)
        if self._saved:
            assert self._checkpoint is not None
            restore(self._saved, self._checkpoint.folder, step, shared.replay, device=self._device)
        measurements = build_measurements(step, shared.replay, process.settings, device=self._device)
        startup_s = time.monotonic() - began
        process.log.info("networks ready", seconds=round(startup_s, 2), parameters=step.parameter_counts())
        writer = self._open_writer(shared, measurements, streaming_since=began, startup_s=startup_s)
        warnings = warn_of_rows(process, shared, writer)
        learner = Learner(
            process,
            device=self._device,
            link=self.link,
            replay=shared.replay,
            pacing=self.pacing,
            counters=self.counters,
            step=step,
            update=update,
            measurements=measurements,
            writer=writer,
            saver=Saver(process, shared, step, self.counters, writer, device=self._device, saved=self._checkpoint),
            publisher=open_publisher(process, step, self.counters),
            recovery=make_recovery(process, step, writer, warnings, self.counters),
        )
        self.link.listener.watch.add(WEIGHTS_SOCKET, learner.publisher.bind_again)
        for chunk in self._early:
            learner.take(chunk)
        learner.publish()
        return learner

    def _open_writer(
        self, shared: SharedReplay, measurements: Measurements, *, streaming_since: float, startup_s: float
    ) -> MetricsWriter:
        """Open metrics.jsonl; in a resumed run, continue with the episodes of the checkpoint."""
        writer = MetricsWriter(
            RunFolder(self._process.run_dir).metrics,
            self._device,
            self.counters,
            constants={
                metrics.REPLAY_RATIO_TARGET: self._process.settings.optimization.replay_ratio,
                metrics.TRANSPORT: "cuda_ipc" if shared.fd is None else "memfd",
                metrics.TRANSPORT_BYTES_PER_S: round(self.link.bandwidth),
                metrics.STARTUP_S: round(startup_s, 3),
            },
            once_per_row=(*measurements.metrics, *RowBounds.metrics),
            streaming_since=streaming_since,
            evaluations=open_evaluations(self._process, self.counters, num_envs=shared.spec.num_envs),
        )
        writer.episodes.load_state(self._saved.get("episodes", {}))  # older checkpoints do not have them
        return writer


def open_link(
    process: Process,
    geometry: Geometry,
    counters: Counters,
    pacing: Pacing,
    allocate: Callable[[StreamSpec, bool], tuple[Replay, int | None]],
) -> CollectorLink:
    """Open the socket for collectors. allocate: see `Handshake`.

    It exists until the process ends, so no callback may refer to the `WaitingLearner`, which has the whole checkpoint.
    """
    handshake = Handshake(
        run_id=process.run.run_id,
        secret=obtain_secret(process.run.socket_dir),
        num_envs=geometry.num_envs,
        allocate=allocate,
        random_frames=partial(remaining_random_frames, geometry.frames_per_chunk, counters=counters, pacing=pacing),
        agent_steps=lambda: counters.agent_steps,
        round_number=lambda: counters.rounds,
        gpu_storage=process.settings.replay_buffer.gpu_storage,
        log=process.log,
        self_test_s=SELF_TEST_STARTS * process.settings.deadlines.start_s,
    )
    return CollectorLink(
        process.run.socket_dir,
        handshake,
        check_sums=process.settings.replay_buffer.checksum,
        log=process.log,
        newest_version=lambda: counters.policy_version,
    )


def open_evaluations(process: Process, counters: Counters, *, num_envs: int) -> EvaluationLog:
    """Open evaluations.jsonl; in a resumed run, without the evaluations of what the resume has undone."""
    path, collector = RunFolder(process.run_dir).evaluations, process.settings.collector
    # Later versions are published again, so an evaluation of one of them is undone even if it began at the checkpoint.
    cut_after(path, counters.policy_version, column=metrics.EVALUATION_VERSION)
    plan = EvaluationPlan.of(collector, num_envs)
    return EvaluationLog(path, num_episodes=plan.num_episodes, eval_in_replay=collector.eval_in_replay)


def load_saved(process: Process) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the newest whole checkpoint and its state. Raises: SettingError if there is none."""
    process.progress.phase("resuming")
    root = RunFolder(process.run_dir).checkpoints
    settle(root)
    return checkpoint.load_newest(root, on_block=process.progress.advance)


def warn_of_rows(process: Process, shared: SharedReplay, writer: MetricsWriter) -> WarningLines:
    """Check each row of metrics for signs of a run that goes wrong. Return what gives the warnings."""
    lines = WarningLines(RunFolder(process.run_dir).warnings("learner"), process.log)
    signs = Signs(process.settings, shared.spec, lines, writer.episodes, shared.replay.row_bounds.names)
    writer.on_row = signs.check
    return lines


def open_publisher(process: Process, step: GradientStep, counters: Counters) -> Publisher:
    """Return what sends the acting weights; its versions go on from those of the checkpoint."""
    socket_dir, run_id = process.run.socket_dir, process.run.run_id
    return Publisher(step.policy, socket_dir=socket_dir, run_id=run_id, version=counters.policy_version)


def make_recovery(
    process: Process, step: GradientStep, writer: MetricsWriter, warnings: WarningLines, counters: Counters
) -> Recovery:
    """Return what goes back to an earlier state when gradients are no longer finite."""
    options = process.settings.optimization
    return Recovery(step, options, writer.sums, warnings, first_step=counters.gradient_steps)


def allocate_and_restore(
    process: Process,
    geometry: Geometry,
    spec: StreamSpec,
    on_gpu: bool,
    *,
    device: torch.device,
    pacing: Pacing,
    counters: Counters,
    saved: Checkpoint | None,
    row_bounds: Mapping[str, torch.Tensor],
) -> tuple[Replay, int | None]:
    """Allocate the replay and fill it from the checkpoint `saved`, if there is one. Return it and its memfd.

    Restored rows shorten the prefill.
    """
    replay, fd = allocate_replay(spec, process.settings, geometry, device=device, on_gpu=on_gpu)
    if saved is not None:
        process.progress.phase("resuming")
        advance = process.progress.advance
        rows = load_replay(saved, replay, spec_digest=spec.digest(), on_block=advance)
        process.progress.phase("hello")
        pacing.prefill = max(0, geometry.replayed_prefill - rows * geometry.num_replayed)
        if rows:
            pacing.resume_from(counters)
            replay.row_bounds.restore(row_bounds)
        process.log.info("replay restored", rows=rows, checkpoint=str(saved.folder))
    memory = describe_gpu(str(replay.slab.device))
    process.log.info(
        "replay allocated", num_bytes=replay.slab.numel(), memory=memory, trains_on=describe_gpu(str(device))
    )
    return replay, fd


def remaining_random_frames(frames_per_chunk: int, *, counters: Counters, pacing: Pacing) -> int:
    """Return how many more agent steps a new collector acts at random.

    It is the rest of the prefill, in whole chunks, which restored rows shorten, and 0 once training has begun.
    """
    chunks = max(0, -(-(pacing.prefill - pacing.collected) // pacing.chunk_frames))
    return 0 if counters.gradient_steps > 0 else chunks * frames_per_chunk
