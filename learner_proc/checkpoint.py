"""Save a checkpoint, and load the newest one that is whole. `shared/checkpoints.py` shows the files.

A folder is written as `.partial-*`, flushed to the disk and then renamed, so a folder with a step as its name was
complete. No folder is ever replaced: a second checkpoint of a step is called `00001200.1`. The learner writes the files
(`write_files`) and trains on; `learner_proc/finishing.py` does the rest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from learner_proc.finishing import failure, finish
from learner_proc.replay import Replay
from learner_proc.replay_files import ReplayFiles, StoredRows
from learner_proc.weights_file import write_safetensors
from shared.checkpoints import (
    Checkpoint,
    DamagedError,
    Manifest,
    StoredFile,
    damaged_checkpoints,
    file_crc32,
    mark_damaged,
    newest_verified,
    read_manifest,
    settle,
    whole_checkpoints,
)
from shared.config import CheckpointSettings
from shared.errors import SettingError
from shared.stream import ObsSpec, StreamSpec


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold, in host memory.

    state: for `--resume`. weights: the networks by name, for weights.safetensors. spec_digest: `StreamSpec.digest` of
    what the run streams. eval_return_mean: None if no evaluation episode has ended.
    """

    step: int
    state: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    spec_digest: str
    eval_return_mean: float | None = None


@dataclass(frozen=True)
class Written:
    """The files of a checkpoint in a folder `.partial-*`. They are not flushed, and the manifest is not written.

    manifest: without the checksums of new files.
    """

    partial: Path
    manifest: Manifest
    rows: tuple[StoredRows, ...]


def save(
    root: Path,
    content: Content,
    replay: ReplayFiles | None,
    options: CheckpointSettings,
    *,
    on_block: Callable[[], None] = lambda: None,
) -> Path:
    """Write and finish a checkpoint and return its folder. Then delete the checkpoints that `options` does not keep.

    replay: writes the rows; None saves none. on_block: called for each block that was read for a checksum.
    Raises: CheckpointError if it cannot be written. Nothing of it is left then.
    """
    written = write_files(root, content, replay)
    final = finish(written.partial, written.manifest, options, on_block=on_block)
    if replay is not None:
        replay.finished(final, written.rows)
    return final


def write_files(root: Path, content: Content, replay: ReplayFiles | None) -> Written:
    """Write the files of a checkpoint. Raises: CheckpointError if it cannot be written. Nothing of it is left then."""
    partial = root / f".partial-{content.step:08d}"
    try:
        root.mkdir(exist_ok=True)
        settle(root)
        partial.mkdir()
        return _write(partial, content, replay, serial=1 + _newest_serial(root))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # it may fill a disk that is full already
        # torch.save raises RuntimeError if the disk is full.
        if isinstance(error, OSError | RuntimeError):
            raise failure(root, content.step, _cause(error)) from error
        raise


def load_newest(root: Path, *, on_block: Callable[[], None] = lambda: None) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the newest checkpoint that is whole, and the content of its state.pt. All checksums are verified first.

    Each damaged checkpoint is skipped with a warning. on_block: called for each block that was read.
    Raises: SettingError if there is none, or if a newer version of Tandem wrote one.
    """
    while True:
        checkpoint = newest_verified(root, on_block=on_block)
        damaged = damaged_checkpoints(root)
        if checkpoint is None:
            found = "".join(f"; {folder.name} is damaged: {reason}" for folder, reason in damaged)
            raise SettingError(
                f"there is no whole checkpoint in {root}{found}; expected a folder with a manifest.json, as a save "
                "leaves it; start a new run without --resume"
            )
        try:
            state = load_state(checkpoint.folder)
        except MemoryError:
            raise
        except Exception as error:  # torch raises many kinds of errors for a damaged file
            mark_damaged(checkpoint.folder, f"state.pt cannot be read: {str(error).splitlines()[0]:.200}")
            if checkpoint.folder not in dict(damaged_checkpoints(root)):  # the folder cannot be written
                raise SettingError(
                    f"{checkpoint.folder}/state.pt cannot be read: {str(error).splitlines()[0]:.200}; expected the "
                    "file that a save wrote; move the folder away to continue from an older checkpoint"
                ) from error
            continue
        for folder, reason in damaged:
            structlog.get_logger().warning("a damaged checkpoint is skipped", checkpoint=str(folder), reason=reason)
        return checkpoint, state


def load_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.pt, in host memory. Raises: DamagedError if its checksum is wrong.

    On the GPU it could be placed in the memory segment that is meant for the replay alone.
    """
    expected, found = read_manifest(folder).files["state.pt"].crc32, file_crc32(folder / "state.pt")
    if expected not in (None, found):
        raise DamagedError(f"state.pt has checksum {found}; expected {expected}")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def stream_spec(checkpoint: Checkpoint) -> StreamSpec:
    """Return what the run streamed, read from the replay in its checkpoint.

    Raises: SettingError if the checkpoint has no replay.
    """
    fields = {field["name"]: field for field in checkpoint.manifest.fields}
    if not fields:
        raise SettingError(
            f"{checkpoint.folder} contains no replay; expected at least one row of it; run with "
            "checkpoint.replay=true until the prefill is done"
        )
    obs = {
        name.removeprefix("obs."): ObsSpec(tuple(field["shape"][1:]), field["dtype"])
        for name, field in fields.items()
        if name.startswith("obs.")
    }
    num_envs, action_dim = fields["action"]["shape"]
    return StreamSpec(num_envs, obs, action_dim)


def random_state(replay: Replay, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of every random generator that the learner uses."""
    state = {"cpu": torch.get_rng_state(), "sampler": replay.generator.get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], replay: Replay, device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    # The sizes differ if the replay was on a GPU when it was saved and is now in host memory, or the reverse.
    if len(state["sampler"]) == len(replay.generator.get_state()):
        replay.generator.set_state(state["sampler"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _write(partial: Path, content: Content, replay: ReplayFiles | None, *, serial: int) -> Written:
    """Write the files of a checkpoint into an empty folder."""
    with (partial / "state.pt").open("xb") as file:
        torch.save(content.state, file)
    if content.weights:
        metadata = {"format": "pt", "step": str(content.step)}
        write_safetensors(partial / "weights.safetensors", content.weights, metadata)
    rows = () if replay is None else replay.write(partial)
    known = {each.path.name: each.crc32 for each in rows}
    files = {path.name: StoredFile(path.stat().st_size, known.get(path.name)) for path in sorted(partial.iterdir())}
    manifest = Manifest(
        step=content.step,
        serial=serial,
        saved_at=time.time(),
        eval_return_mean=content.eval_return_mean,
        spec_digest=content.spec_digest,
        replay_rows=0 if replay is None else replay.num_rows,
        fields=tuple(replay.fields()) if replay is not None and rows else (),
        segments=tuple(each.segment for each in rows),
        files=files,
    )
    return Written(partial, manifest, rows)


def _newest_serial(root: Path) -> int:
    """Return the highest serial number of a checkpoint; 0 if there is none."""
    return max((each.manifest.serial for each in whole_checkpoints(root)), default=0)


def _cause(error: BaseException) -> str:
    """Return the text of the error of the disk, if there was one: torch.save then raises another one that hides it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return str(seen or error).splitlines()[0]
