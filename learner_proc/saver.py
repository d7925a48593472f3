"""When a checkpoint is written, what of the learner is in it, and how it is restored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from learner_proc import checkpoint
from learner_proc.checkpoint import Content
from learner_proc.finishing import Finisher
from learner_proc.gradient_step import SCALE_GROUP, GradientStep
from learner_proc.handshake import SharedReplay
from learner_proc.host_blocks import HostBlocks
from learner_proc.metrics_writer import MetricsWriter
from learner_proc.replay import Replay
from learner_proc.replay_files import ReplayFiles, StoredRows
from learner_proc.snapshot import Groups, not_finite, on_host
from learner_proc.totals import Counters
from shared import metrics
from shared.checkpoints import Checkpoint, CheckpointError
from shared.errors import SettingError
from shared.process import Process
from shared.run_folder import RunFolder

SOON_S = 60.0  # the time after which a save is tried again that found a bad state
MOST_SKIPPED = 20  # float16 skips a dozen steps until its loss scale settles, and single ones later


class BadStateError(CheckpointError):
    """The state of the learner is not worth keeping. The earlier checkpoints are as they were."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being finished: since when (`time.perf_counter()`), and how long training waited for it."""

    finisher: Finisher
    rows: tuple[StoredRows, ...]
    began: float
    waited_s: float


class Saver:
    """Writes a checkpoint every `checkpoint.every_s` seconds, and whenever `save` is called."""

    def __init__(
        self,
        process: Process,
        shared: SharedReplay,
        step: GradientStep,
        counters: Counters,
        writer: MetricsWriter,
        *,
        device: torch.device,
        saved: Checkpoint | None = None,
    ) -> None:
        """saved: the checkpoint from which the run continues."""
        self._process, self._device, self._shared = process, device, shared
        self._step, self._counters, self._writer = step, counters, writer
        self._blocks = HostBlocks(device, on_block=process.progress.advance)
        self._replay = ReplayFiles(shared.replay, self._blocks)
        if saved is not None:
            self._replay.continue_from(saved)
        self._saved_at = time.monotonic()
        self._pending: _Pending | None = None
        self.saved_step = -1  # the gradient step of the newest checkpoint of this process

    def save_if_due(self) -> None:
        """Begin a checkpoint if it is due or asked for. If it fails, log a warning: training must go on.

        The files are written here. Another process computes their checksums and flushes them while training goes on.
        """
        every_s = self._process.settings.checkpoint.every_s
        try:
            if self._pending is not None and not self._take_finished():
                return
            if time.monotonic() - self._saved_at > every_s or self._process.save.take():
                self._begin()
        except CheckpointError as error:
            self._process.log.warning("a checkpoint failed; it is tried again later", reason=str(error))
            retry_s = SOON_S if isinstance(error, BadStateError) else every_s
            self._saved_at = time.monotonic() - every_s + min(retry_s, every_s)
            self._process.progress.phase("training")

    def wait(self) -> None:
        """Wait until no checkpoint is being finished. If it fails, log a warning."""
        if self._pending is not None:
            self._process.progress.phase("saving")
            try:
                self._take_finished(wait=True)
            except CheckpointError as error:
                self._process.log.warning("a checkpoint failed", reason=str(error))
            self._process.progress.phase("training")

    def save(self) -> None:
        """Write a checkpoint and wait for it. Afterwards the process is in phase "training" again.

        Raises: CheckpointError if it cannot be written; BadStateError if the state is not worth keeping.
        """
        self.wait()
        self._begin(most_skipped=MOST_SKIPPED)
        self._process.progress.phase("saving")
        self._take_finished(wait=True)
        self.saved_step = self._counters.gradient_steps
        self._process.progress.phase("training")

    def _begin(self, *, most_skipped: int = 0) -> None:
        """Write the files of a checkpoint, and start the process that finishes it.

        most_skipped: refuse to save if more than so many gradient steps in a row were skipped.

        Every block that leaves the GPU counts as progress. No message is served meanwhile: a grant would let the
        collector overwrite rows that are not saved yet, and a commit would move the ring's bounds. The collector goes
        on with the chunks that are granted already.
        Raises: CheckpointError if it cannot be written; BadStateError if the state is not worth keeping.
        """
        process, options = self._process, self._process.settings.checkpoint
        process.progress.phase("saving")
        began = time.perf_counter()
        self._check_state(most_skipped)
        root, replay = RunFolder(process.run_dir).checkpoints, self._replay if options.replay else None
        written = checkpoint.write_files(root, self._content(), replay)
        self._pending = _Pending(
            Finisher(written.partial, written.manifest, options), written.rows, began, time.perf_counter() - began
        )
        self._saved_at = time.monotonic()
        process.progress.phase("training")

    def _take_finished(self, *, wait: bool = False) -> bool:
        """Return whether the pending checkpoint is finished, and note its rows then. wait: wait for it.

        Raises: CheckpointError if it failed.
        """
        pending, advance = self._pending, self._process.progress.advance
        assert pending is not None
        try:
            folder = pending.finisher.wait(on_block=advance) if wait else pending.finisher.poll()
        except CheckpointError:
            self._pending = None
            raise
        if folder is None:
            return False
        self._pending = None
        self._replay.finished(folder, pending.rows)
        seconds = round(time.perf_counter() - pending.began, 2)
        self._process.log.info(
            "checkpoint", folder=str(folder), seconds=seconds, training_waited_s=round(pending.waited_s, 2)
        )
        return True

    def _check_state(self, most_skipped: int) -> None:
        """Raise BadStateError if a number is not finite or too many steps in a row were skipped. Waits for the device.

        A checkpoint of such a state would replace a good one.
        """
        sums = self._writer.sums
        sums.mark()
        last = sums.last(metrics.SKIPPED)
        in_a_row = max(sums.poll_marks(), 1) if last is not None and last.item() > 0 else 0
        name, problem = not_finite(self._step.tensors()), None
        if name is not None:
            problem = f"{name} holds numbers that are not finite; expected finite ones"
        elif in_a_row > most_skipped:
            problem = f"the last gradient step was skipped, {in_a_row} in a row or more; expected finite gradients"
        if problem is not None:
            raise BadStateError(
                f"the checkpoint of step {self._counters.gradient_steps} was not saved: {problem}; resume from the "
                "checkpoint before with a lower learning rate if this goes on"
            )

    def _content(self) -> Content:
        """Return a copy of what a checkpoint holds beside the replay."""
        episodes, groups = self._writer.episodes, on_host(self._step.tensors(), self._blocks)
        return Content(
            step=self._counters.gradient_steps,
            state={
                "gradient_step": groups,
                "counters": asdict(self._counters),
                "episodes": episodes.state(),
                "row_bounds": {name: x.cpu().clone() for name, x in self._shared.replay.row_bounds.tensors().items()},
                "random_state": checkpoint.random_state(self._shared.replay, self._device),
            },
            weights=weights_of(groups),
            spec_digest=self._shared.spec.digest(),
            eval_return_mean=episodes.means()[metrics.EVAL_RETURN_MEAN],
        )


def weights_of(groups: Groups) -> dict[str, torch.Tensor]:
    """Return the networks and the normaliser by name, without what only training needs."""
    networks = {name: tensors for name, tensors in groups.items() if not name.startswith(("adam_", SCALE_GROUP))}
    return {f"{group}.{name}": tensor for group, tensors in networks.items() for name, tensor in tensors.items()}


def restore(
    state: Mapping[str, Any], folder: Path | None, step: GradientStep, replay: Replay, *, device: torch.device
) -> None:
    """Restore networks, optimisers and random states from the state that was loaded from a checkpoint in `folder`.

    Raises: SettingError if they do not fit this run's settings.
    """
    try:
        step.load_state_dict(state["gradient_step"])
    except ValueError as error:
        raise SettingError(f"{folder}: {error}") from error
    checkpoint.restore_random_state(state["random_state"], replay, device)
