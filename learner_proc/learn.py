"""The learner's loop: messages, grants, gradient step, publish, log, save. One Python thread, and it never waits for the GPU
except to stay at most two steps ahead of it."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict

from learner_proc import checkpoint
from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics
from learner_proc.link import CollectorLink
from learner_proc.metrics_writer import Counters, Report
from learner_proc.numbers import Numbers
from learner_proc.pacing import Pacing
from learner_proc.publisher import Publisher
from learner_proc.replay import Replay
from learner_proc.return_check import ReturnCheck
from learner_proc.startup import allocate_replay, build_gradient_step, build_step
from shared import metrics
from shared.checksum import checksum
from shared.config import Settings
from shared.errors import SettingError, TransportError
from shared.geometry import Geometry
from shared.messages import Commit
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from learner_proc.gradient_step import GradientStep
    from shared.lifetime import StopFlag
    from shared.progress import Progress
    from shared.run_folder import Run

IDLE_S = 0.01  # longest sleep while neither a step nor a message is due
STATUS_S = 0.5  # seconds between two live statuses
STEPS_AHEAD = 2
MAX_SKIPPED = 100  # steps in a row without a finite gradient; float16 needs a dozen until its loss scale settles
DIAGNOSTIC_WINDOWS = 64  # sampled for the open-loop error of every row of metrics.jsonl
REPUBLISH_S = 0.2


class Learner:
    """Owner of the replay, the networks and everything else that must survive.

    Life: `__init__` opens the sockets; `run` waits for the first hello, builds and compiles while the collector fills the
    replay, then trains to `optimization.total_optim_steps` or until asked to stop, and leaves a checkpoint.
    """

    def __init__(
        self,
        settings: Settings,
        geometry: Geometry,
        run: Run,
        *,
        run_dir: Path,
        device: torch.device,
        progress: Progress,
        stop: StopFlag,
        log,
        resume: bool,
    ) -> None:
        self._settings, self._geometry, self._run_dir = settings, geometry, run_dir
        self._device, self._progress, self._stop, self._log = device, progress, stop, log
        self._run = run
        self._folder = checkpoint.newest(run_dir / "checkpoints") if resume else None
        self._saved = checkpoint.load_state(self._folder) if self._folder else None
        self.counters, self._episodes = Counters(), {}
        if self._saved is not None:
            vars(self.counters).update(self._saved["counters"])
            self._episodes = self._saved.get("episodes", {})  # checkpoints of before have none
        self._pacing = Pacing(
            geometry.frames_per_chunk,
            geometry.frames_per_step,
            settings.optimization.replay_ratio,
            geometry.prefill_frames,
            lockstep=settings.collector.mode == "lockstep",
        )
        self._link = CollectorLink(
            run.socket_dir,
            run_id=run.run_id,
            num_envs=geometry.num_envs,
            allocate=self._allocate,
            random_frames=self._random_frames,
            agent_steps=lambda: self.counters.agent_steps,
            log=log,
        )
        self._unseen: deque[int] = deque()  # committed chunks the normaliser has not seen
        self._early: list[Commit] = []  # commits that arrived before there was a report
        self._events: deque[torch.cuda.Event] = deque()
        self._step: GradientStep | None = None
        self._saved_at = self._status_at = self._published_at = time.monotonic()
        self._published_step = -1
        self._adopted = 0  # policy version of the present collector's last commit
        self._greeted = 0  # collectors that have begun to stream

    def run(self) -> None:
        """Raises: TransportError if no collector says hello in time; FloatingPointError if training diverged for good."""
        self._progress.phase("hello")
        self._wait_for_collector()
        if self._stop.requested:
            return
        self._build()
        self._progress.phase("prefill")
        while not self._finished() and not self._may_step():
            self._serve()
            self._idle()
        self._progress.phase("training")
        while not self._finished():
            self._serve()
            if self._may_step():
                self._train()
            else:
                self._idle()
            self._show_status()
        self._end()

    # ---- start-up -------------------------------------------------------------------------------------------------

    def _allocate(self, spec: StreamSpec) -> tuple[Replay, int | None]:
        replay, fd = allocate_replay(spec, self._settings, self._geometry, device=self._device)
        if self._folder is not None:
            rows = checkpoint.load_replay(self._folder, replay, spec_digest=spec.digest())
            self._pacing.prefill = max(0, self._pacing.prefill - rows * spec.num_envs)
            self._log.info("replay restored", rows=rows, checkpoint=str(self._folder))
        self._log.info("replay allocated", num_bytes=replay.slab.numel(), device=str(replay.slab.device))
        return replay, fd

    def _random_frames(self) -> int:
        """Uniform random rows still wanted: the rest of the prefill, none once weights have been trained."""
        if self.counters.gradient_steps > 0:
            return 0
        return max(0, self._geometry.prefill_frames - self._pacing.collected)

    def _build(self) -> None:
        """Networks, compiled while the collector fills the replay; then everything that speaks of them."""
        self._progress.phase("compiling")
        assert self._link.spec is not None and self._link.replay is not None
        self._serve()  # the grants of the whole prefill go out before the long silence
        began, replay = time.monotonic(), self._link.replay
        self._step = build_gradient_step(self._link.spec, self._settings, device=self._device)
        self._update = build_step(self._step, replay, self._settings, self._geometry, device=self._device)
        self._restore()
        self._diagnostics = Diagnostics(
            self._link.spec, self._step.world_model, self._step.policy.normaliser, length=self._diagnostic_rows()
        )
        self._returns = ReturnCheck(
            self._step.world_model, self._step.policy.normaliser, self._step.critic, self._settings.optimization
        )
        seconds = time.monotonic() - began
        self._log.info("networks ready", seconds=round(seconds, 2), parameters=self._step.parameter_counts())
        self._report = Report(
            self._run_dir / "metrics.jsonl",
            self._device,
            self.counters,
            streaming_since=began,
            diagnostic_metrics=(*self._diagnostics.metrics, *self._returns.metrics, metrics.SAMPLED_VERSION_MEAN),
            constants={
                "replay_ratio_target": self._settings.optimization.replay_ratio,
                "transport": "cuda_ipc" if replay.slab.is_cuda else "memfd",
                "transport_bytes_per_s": round(self._link.bandwidth),
                "startup_s": round(seconds, 3),
            },
        )
        self._report.remember(self._episodes)
        for commit in self._early:
            self._report.add_commit(commit, newest_version=0)
        self._early.clear()
        while self._unseen:
            self._observe(replay.chunk(self._unseen.popleft()))
        self._publisher = Publisher(
            self._step.policy,
            socket_dir=self._run.socket_dir,
            run_id=self._run.run_id,
            version=self.counters.policy_version,
        )
        self._publish()

    def _restore(self) -> None:
        """Networks, optimisers and random states of the checkpoint, if the run is resumed. Raises: SettingError."""
        if self._saved is None:
            return
        assert self._step is not None and self._link.replay is not None
        try:
            self._step.load_state_dict(self._saved["gradient_step"])
        except ValueError as error:
            raise SettingError(f"{self._folder}: {error}") from error
        checkpoint.restore_random_state(self._saved["random_state"], self._link.replay, self._device)
        self._saved = None

    # ---- the steady loop ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Take what the collector said, give it room, send what is ready. Never blocks."""
        for commit in self._link.poll():
            self._commit(commit)
        self._link.flush()
        replay = self._link.replay
        if replay is not None:
            while self._link.streaming and self._pacing.may_grant(replay.num_granted):
                self._link.grant(self._version_for_grant())
        if self._step is not None:
            self._publisher.flush()
            if self._link.streaming and self._greeted != self._link.num_greeted:
                # it has no weights, whatever the one before it had: until it commits, they are sent again and again
                self._greeted, self._adopted = self._link.num_greeted, 0
                self._publisher.republish()

    def _may_step(self) -> bool:
        assert self._link.replay is not None
        return self._pacing.may_step(self._link.replay.num_granted)

    def _idle(self) -> None:
        """Neither a step nor a message is due. A collector that subscribed late may be waiting for weights it missed."""
        self._progress.advance()
        missed = self._adopted < self._publisher.version
        if missed and time.monotonic() - self._published_at > REPUBLISH_S:
            self._published_at = time.monotonic()
            self._publisher.republish()
        self._link.wait(IDLE_S)

    def _version_for_grant(self) -> int:
        """In lockstep the collector acts with the newest weights or not at all."""
        if not self._pacing.lockstep or self._step is None or not self._pacing.prefilled:
            return 0
        if self._published_step != self.counters.gradient_steps:
            self._publish()
        return self._publisher.version

    def _commit(self, commit: Commit) -> None:
        replay = self._link.replay
        assert replay is not None
        chunk = replay.commit(commit.row)
        if self._settings.replay_buffer.checksum:
            found = checksum(chunk[entry.key] for entry in replay.layout.fields)
            if found != commit.checksum:
                raise TransportError(
                    f"chunk {commit.seq} at ring row {commit.row} has checksum {found}, its commit says {commit.checksum}; "
                    "wanted equal sums; the link between the GPUs corrupts data: run both processes on one GPU"
                )
        self._pacing.collected += self._geometry.frames_per_chunk
        if self._step is None:
            self._unseen.append(commit.row)
            self._early.append(commit)
            return
        self._observe(chunk)
        self._report.add_commit(commit, newest_version=self._publisher.version)
        self._adopted = commit.policy_version

    def _observe(self, chunk: TensorDict) -> None:
        """Newly committed vectors to the normaliser, from wherever the replay lies."""
        assert self._step is not None
        obs = chunk.get("obs").to_dict()
        self._step.observe_statistics({name: x.to(self._device) for name, x in obs.items() if x.is_floating_point()})

    def _train(self) -> None:
        assert self._step is not None and self._link.replay is not None
        if len(self._events) >= STEPS_AHEAD:
            self._events.popleft().synchronize()  # blocking event: no spin, the GIL is released
        self._report.add_step(self._update())
        if self._device.type == "cuda":
            self._events.append(torch.cuda.Event(blocking=True))
            self._events[-1].record()
        self.counters.gradient_steps += 1
        self._pacing.replayed += self._geometry.frames_per_step
        self._progress.advance()
        steps, options = self.counters.gradient_steps, self._settings.optimization
        if steps % options.publish_every == 0 and not self._pacing.lockstep:
            self._publish()
        if steps % options.log_every == 0:
            self._request_row()
        self._report.poll()
        if self._report.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradients of the last {self._report.skipped_in_a_row} steps up to {steps} were not finite; wanted "
                "finite losses; resume from a checkpoint with a lower learning rate or optimization.autocast=bfloat16"
            )
        if time.monotonic() - self._saved_at > self._settings.checkpoint.every_s:
            self._save()

    def _publish(self) -> None:
        before = self._publisher.version
        self._publisher.publish()
        self.counters.policy_version = self._publisher.version
        if self._publisher.version > before:
            self._published_step, self._published_at = self.counters.gradient_steps, time.monotonic()

    def _request_row(self) -> None:
        """A row of metrics.jsonl, with what the model and the critic say of freshly sampled windows."""
        replay, length = self._link.replay, self._diagnostic_rows()
        assert replay is not None
        errors = None
        if replay.num_rows >= length:
            # training's generator stays as it is, and a resumed run looks at what the first one would have
            looking = torch.Generator(replay.slab.device).manual_seed(self.counters.gradient_steps)
            batch = replay.sample(DIAGNOSTIC_WINDOWS, length, generator=looking)
            version = Numbers.of({metrics.SAMPLED_VERSION_MEAN: batch["policy_version"].float().mean()})
            errors = Numbers.join([self._diagnostics(batch), self._returns(batch), version])
        self._report.request_row(
            errors,
            replay_ratio=self._replay_ratio(),
            messages_dropped=self._link.num_dropped,
            publications_skipped=self._publisher.num_skipped,
        )

    def _diagnostic_rows(self) -> int:
        return min(WINDOW_LENGTH, self._geometry.capacity - 2 * self._geometry.ticks_per_chunk)

    def _replay_ratio(self) -> float:
        """Of the whole run; the ledger that paces it begins anew with every resume."""
        replayed = self.counters.gradient_steps * self._geometry.frames_per_step
        return replayed / max(self.counters.agent_steps, 1)

    def _show_status(self) -> None:
        if time.monotonic() - self._status_at > STATUS_S:
            self._status_at = time.monotonic()
            options = self._settings.optimization
            extra = {"replay_ratio": self._replay_ratio(), "replay_ratio_target": options.replay_ratio}
            self._progress.status(self._report.live() | extra | {"total_optim_steps": options.total_optim_steps})

    def _finished(self) -> bool:
        return self._stop.requested or self.counters.gradient_steps >= self._settings.optimization.total_optim_steps

    def _wait_for_collector(self) -> None:
        """Serve until a collector streams; the deadline begins anew with every incarnation that comes as far as a hello.

        Twice `start_s`: its simulator may take that long, and its hello and self-test again.
        """
        patience, greeted = 2 * self._settings.deadlines.start_s, -1
        end = 0.0
        while not self._link.streaming and not self._stop.requested:
            if self._link.num_greeted != greeted:
                greeted, end = self._link.num_greeted, time.monotonic() + patience
            if time.monotonic() > end:
                raise TransportError(
                    f"waited {patience:.0f} s for a collector's hello and self-test, {greeted} came so far; "
                    "look at logs/collector.out, or raise deadlines.start_s"
                )
            self._serve()
            self._progress.advance()
            self._link.wait(IDLE_S)

    # ---- the end --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self._step is not None and self._link.replay is not None
        self._progress.phase("saving")
        began, replay = time.perf_counter(), self._link.replay
        state = {
            "gradient_step": self._step.state_dict(),
            "counters": dict(vars(self.counters)),
            "episodes": self._report.recent(),
            "random_state": checkpoint.random_state(replay, self._device),
        }
        folder = checkpoint.save(
            self._run_dir / "checkpoints",
            self.counters.gradient_steps,
            state,
            replay if self._settings.checkpoint.replay else None,
            spec_digest=self._link.spec.digest() if self._link.spec else "",
            keep=self._settings.checkpoint.keep,
        )
        self._saved_at = time.monotonic()
        self._log.info("checkpoint", folder=str(folder), seconds=round(time.perf_counter() - began, 2))
        self._progress.phase("training")

    def _end(self) -> None:
        """The last row, the last weights, the last checkpoint."""
        self._request_row()
        self._report.poll(wait=True)
        self._save()
        self._progress.phase("stopping")
        self._report.close()
        self._publisher.close()
        self._link.close()
        self._log.info("ended", gradient_steps=self.counters.gradient_steps, asked=self._stop.requested)
