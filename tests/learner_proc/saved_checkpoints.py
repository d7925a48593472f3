"""Small checkpoints for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from learner_proc import checkpoint
from learner_proc.checkpoint import Content
from learner_proc.replay import Replay
from learner_proc.replay_files import ReplayFiles
from shared.config import CheckpointSettings
from tests.learner_proc.identified_rows import SPEC, fill, make_replay


def save(
    root: Path,
    step: int,
    replay: Replay | ReplayFiles | None = None,
    *,
    keep: int = 2,
    state: dict | None = None,
    digest: str = SPEC.digest(),
    eval_return: float | None = None,
) -> Path:
    """Save a checkpoint whose state is {"step": step}, and return its folder. Only the newest `keep` are kept."""
    content = Content(step, {"step": step} if state is None else state, {"x": torch.ones(2)}, digest, eval_return)
    options = CheckpointSettings(keep=keep, keep_best=False, keep_every_h=None)
    return checkpoint.save(root, content, ReplayFiles(replay) if isinstance(replay, Replay) else replay, options)


def save_two(root: Path) -> None:
    """Save two checkpoints of one run, at steps 1 and 2, that share a segment of the replay."""
    replay = make_replay()
    files = ReplayFiles(replay)
    for step in (1, 2):
        fill(replay, 3, start=3 * (step - 1))
        save(root, step, files)


def loaded(root: Path) -> tuple[str, dict]:
    """Return the name of the newest whole checkpoint, and its state."""
    found, state = checkpoint.load_newest(root)
    return found.folder.name, state
