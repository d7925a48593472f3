"""Checkpoints: one folder each. A folder is either complete or ignored; `latest` names the newest.

    checkpoints/00001200/state.pt      networks, optimisers, counters, random states
                         replay.bin    the rows that can be sampled: one field after the other, each oldest row first
                         manifest.json step, digest of the stream, number of rows, fields, sizes of the files
    checkpoints/latest                 "00001200"

manifest.json is written last, so a folder that has one was complete. If one of its files is missing or has another
size, the folder is damaged, and an older one is used. A folder is written as `.partial-*` and then renamed. If there is
a checkpoint of the same step, it is renamed to `.aside-*` first and deleted last, so that a complete newest checkpoint
exists at every instant.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import structlog
import torch

from learner_proc.host_blocks import BLOCK_BYTES, HostBlocks
from learner_proc.replay import Replay
from shared.errors import SettingError
from shared.files import write_atomic
from shared.run_folder import (
    checkpoint_damage,
    checkpoint_step,
    damaged_checkpoints,
    newest_checkpoint,
    whole_checkpoints,
)
from shared.stream import DTYPE_BYTES, ObsSpec, StreamSpec

SYNC_BLOCKS = 4  # after so many blocks the file is flushed to the disk, so that no single flush takes long


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, for example because the disk is full. The earlier checkpoints are whole."""


def save(
    root: Path,
    step: int,
    state: dict[str, Any],
    replay: Replay | None,
    *,
    spec_digest: str,
    keep: int,
    blocks: HostBlocks | None = None,
) -> Path:
    """Write a checkpoint and return its folder. Then delete all but the `keep` newest checkpoints, and damaged ones.

    state: in host memory. replay: its rows are saved too, unless it is None. spec_digest: `StreamSpec.digest` of what
    the run streams. blocks: brings the rows to the host; None makes one.
    Raises: CheckpointError if it cannot be written. Nothing of it is left then.
    """
    partial = root / f".partial-{step:08d}"
    try:
        root.mkdir(exist_ok=True)
        for leftover in root.glob(".partial-*"):  # left by a process that was killed while it saved
            if leftover == partial or checkpoint_damage(leftover) is not None:
                shutil.rmtree(leftover)
        partial.mkdir()
        _write(partial, step, state, replay, spec_digest=spec_digest, blocks=blocks)
        final = _put_in_place(partial, root / f"{step:08d}")
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # it may fill a disk that is full already
        # torch.save raises RuntimeError if the disk is full.
        if isinstance(error, OSError | RuntimeError):
            last = newest_checkpoint(root)
            kept = "there is no earlier one" if last is None else f"the last one is of step {checkpoint_step(last)}"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be saved, {kept}: {_cause(error)}; expected a "
                f"disk with free space at {root}; free some of it"
            ) from error
        raise
    _delete_others(root, final, keep)
    return final


def _cause(error: BaseException) -> str:
    """Return the text of the error of the disk, if there was one: torch.save then raises another one that hides it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return str(seen or error).splitlines()[0]


def load_newest(root: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the newest checkpoint that can be read, and the content of its state.pt.

    Raises: SettingError if there is none.
    """
    problems = [f"{folder.name}: {damage}" for folder, damage in damaged_checkpoints(root)]
    for folder in whole_checkpoints(root):
        try:
            return folder, load_state(folder)
        except MemoryError:
            raise
        except Exception as error:  # torch raises many kinds of errors for a damaged file
            problems.append(f"{folder.name}: state.pt cannot be read: {str(error).splitlines()[0]:.200}")
            structlog.get_logger().warning("a damaged checkpoint is skipped", checkpoint=problems[-1])
    found = f" ({'; '.join(problems)})" if problems else ""
    raise SettingError(
        f"there is no whole checkpoint in {root}{found}; expected a folder with a manifest.json, as a save leaves it; "
        "start a new run without --resume"
    )


def stream_spec(folder: Path) -> StreamSpec:
    """Return what the run streamed, read from the replay in its checkpoint.

    Raises: SettingError if the checkpoint has no replay.
    """
    fields = {field["name"]: field for field in json.loads((folder / "manifest.json").read_text())["fields"]}
    if not fields:
        raise SettingError(
            f"{folder} contains no replay; expected at least one row of it; run with checkpoint.replay=true until the "
            "prefill is done"
        )
    obs = {
        name.removeprefix("obs."): ObsSpec(tuple(field["shape"][1:]), field["dtype"])
        for name, field in fields.items()
        if name.startswith("obs.")
    }
    num_envs, action_dim = fields["action"]["shape"]
    return StreamSpec(num_envs, obs, action_dim)


def load_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.pt, in host memory.

    On the GPU it could be placed in the memory segment that is meant for the replay alone.
    """
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def load_replay(folder: Path, replay: Replay, *, spec_digest: str, on_block: Callable[[], None] = lambda: None) -> int:
    """Fill the ring from a checkpoint and return the number of rows. A ring that became smaller gets the newest rows.

    on_block: called for each block that was read, to report progress.
    Raises: SettingError if the checkpoint was written for another stream, or if its replay.bin is too short.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["spec_digest"] != spec_digest:
        raise SettingError(
            f"{folder} was written for stream {manifest['spec_digest']}; expected stream {spec_digest}, with the "
            "observations, actions and number of environments of this run; "
            "undo the overrides of env.* or start a new run"
        )
    saved_rows = manifest["replay_rows"]
    num_rows = min(saved_rows, replay.layout.capacity)
    num_rows -= num_rows % replay.ticks_per_chunk
    if num_rows == 0:
        return 0
    offset = 0
    for entry in replay.layout.fields:
        target = replay.views.get(entry.key)
        row_bytes = math.prod(target.shape[1:]) * DTYPE_BYTES[entry.dtype]
        begin = offset + (saved_rows - num_rows) * row_bytes
        _read_rows(folder / "replay.bin", begin, target[:num_rows], row_bytes, on_block)
        offset += saved_rows * row_bytes
    replay.restore(num_rows)
    return num_rows


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


def _write(
    partial: Path,
    step: int,
    state: dict[str, Any],
    replay: Replay | None,
    *,
    spec_digest: str,
    blocks: HostBlocks | None,
) -> None:
    """Write the files of a checkpoint into an empty folder. The manifest, with the sizes of the others, comes last."""
    with (partial / "state.pt").open("wb") as file:
        torch.save(state, file)
        _sync(file)
    rows = 0 if replay is None else replay.num_rows
    manifest = {"step": step, "spec_digest": spec_digest, "replay_rows": rows, "fields": []}
    if replay is not None and rows > 0:
        manifest["fields"] = _write_rows(partial / "replay.bin", replay, blocks or HostBlocks(replay.slab.device))
    manifest["files"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1))


def _put_in_place(partial: Path, final: Path) -> Path:
    """Give a complete folder its final name, let `latest` name it, and return it."""
    aside, latest = final.with_name(f".aside-{final.name}"), final.with_name("latest")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    if latest.is_dir():
        shutil.rmtree(latest)
    write_atomic(latest, final.name)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def _delete_others(root: Path, final: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, of which `final` is one. Damaged ones are deleted too."""
    others = sorted(folder for folder in root.iterdir() if folder.name.isdigit() and folder != final)
    whole = [folder for folder in others if checkpoint_damage(folder) is None]
    kept = whole[max(0, len(whole) - (keep - 1)) :]
    for folder in others:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_rows(path: Path, replay: Replay, blocks: HostBlocks) -> list[dict[str, Any]]:
    """Write every field's rows, oldest first, and return name, shape and dtype of each field.

    The rows are copied block by block, so that no copy of a full ring is needed.
    """
    capacity, start = replay.layout.capacity, replay.first % replay.layout.capacity
    end = start + replay.num_rows
    spans = [(start, min(end, capacity))] + ([(0, end - capacity)] if end > capacity else [])
    views = [(entry, replay.views.get(entry.key)) for entry in replay.layout.fields]
    with path.open("wb") as file:
        for number, block in enumerate(blocks.read(view[first:last] for _, view in views for first, last in spans), 1):
            block.numpy().tofile(file)
            if number % SYNC_BLOCKS == 0:
                _sync(file)
        _sync(file)
    return [{"name": entry.name, "shape": list(view.shape[1:]), "dtype": entry.dtype} for entry, view in views]


def _read_rows(path: Path, offset: int, target: torch.Tensor, row_bytes: int, on_block: Callable[[], None]) -> None:
    """Read rows from a byte offset of the file into `target`, block by block. Raises: SettingError."""
    step = max(1, BLOCK_BYTES // row_bytes)
    with path.open("rb") as file:
        file.seek(offset)
        for row in range(0, len(target), step):
            part = target[row : row + step]
            raw = bytearray(file.read(len(part) * row_bytes))
            if len(raw) != part.nbytes:
                raise SettingError(
                    f"{path} ends after {file.tell()} bytes, in the middle of the replay; expected every row that "
                    f"manifest.json counts; delete {path.parent} to continue from an older checkpoint"
                )
            on_block()
            part.copy_(torch.frombuffer(raw, dtype=target.dtype).view(part.shape))


def _sync(file: IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
