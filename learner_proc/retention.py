"""Which checkpoints stay: the newest ones whole; the best one and one every few hours without their replay."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shared.checkpoints import (
    Checkpoint,
    DamagedError,
    NewerFormatError,
    checkpoint_folders,
    read_manifest,
    whole_checkpoints,
    write_manifest,
)
from shared.config import CheckpointSettings


def delete_others(root: Path, options: CheckpointSettings) -> None:
    """Delete the checkpoints that the settings do not keep, and damaged ones. Files that cannot be deleted stay."""
    found = whole_checkpoints(root)
    kept = chosen(found, options)
    for folder in checkpoint_folders(root):
        if folder not in {each.folder for each in kept} and not _is_newer(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for checkpoint in kept[options.keep :]:
        with suppress(OSError, DamagedError):
            drop_replay(checkpoint)


def chosen(found: Sequence[Checkpoint], options: CheckpointSettings) -> list[Checkpoint]:
    """Return the checkpoints to keep: first the `options.keep` newest, then the others. found: the newest first."""
    others = set()
    if options.keep_best:
        rated = [each for each in found if each.manifest.eval_return_mean is not None]
        best = max(rated, key=lambda each: each.manifest.eval_return_mean or 0.0, default=None)  # the newest of equals
        others |= {best.folder} if best is not None else set()
    if options.keep_every_h is not None:
        last = None
        for each in reversed(found):  # from the oldest on, so that later saves do not change the choice
            if last is None or each.manifest.saved_at - last >= options.keep_every_h * 3600:
                last = each.manifest.saved_at
                others.add(each.folder)
    return [*found[: options.keep], *(each for each in found[options.keep :] if each.folder in others)]


def drop_replay(checkpoint: Checkpoint) -> None:
    """Delete the replay of a checkpoint. It stays whole: a run that continues from it fills its replay again.

    The manifest is replaced first, so that a kill leaves at most files that the next call deletes.
    Raises: OSError.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    names = {segment.file for segment in manifest.segments}
    if names and manifest.format > 1:
        files = {name: file for name, file in manifest.files.items() if name not in names}
        manifest = replace(manifest, replay_rows=0, fields=(), segments=(), files=files)
        write_manifest(folder, manifest)
    for path in folder.glob("replay*.bin"):
        if path.name not in manifest.files:
            path.unlink()


def _is_newer(folder: Path) -> bool:
    """Return whether a newer version of Tandem wrote the checkpoint."""
    try:
        read_manifest(folder)
    except NewerFormatError:
        return True
    except DamagedError:
        return False
    return False
