"""Checkpoints: one folder each, complete or absent, and `latest` naming the newest.

    checkpoints/00001200/state.pt      networks, optimisers, counters, random states
                         replay.bin    the rows in the sampler's reach, oldest first, field after field
                         manifest.json stream digest, rows, fields; written last, so what has one is complete
    checkpoints/latest                 "00001200"

A folder is written as `.partial-*` and renamed. One of the same step is moved aside first and deleted last, so that
there is a complete newest checkpoint at every instant.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from learner_proc.replay import Replay
from shared.errors import SettingError
from shared.run_folder import newest_checkpoint
from shared.stream import DTYPE_BYTES, ObsSpec, StreamSpec

BLOCK_BYTES = 64 * 1024 * 1024  # of a field, on its way between the replay and the file


def save(root: Path, step: int, state: dict[str, Any], replay: Replay | None, *, spec_digest: str, keep: int) -> Path:
    """Write a checkpoint beside its final name, sync it, rename it, then delete all but the `keep` newest."""
    root.mkdir(parents=True, exist_ok=True)
    final, partial, aside = root / f"{step:08d}", root / f".partial-{step:08d}", root / f".aside-{step:08d}"
    for leftover in root.glob(".partial-*"):  # of a save that was killed
        shutil.rmtree(leftover)
    partial.mkdir()
    with (partial / "state.pt").open("wb") as file:
        torch.save(state, file)
        _sync(file)
    rows = 0 if replay is None else replay.num_rows
    manifest = {"step": step, "spec_digest": spec_digest, "replay_rows": rows, "fields": []}
    if replay is not None and rows > 0:
        manifest["fields"] = _write_rows(partial / "replay.bin", replay)
    _replace_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    _replace_text(root / "latest", final.name)
    shutil.rmtree(aside, ignore_errors=True)
    for old in sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdigit() and p != final)[: -keep + 1 or None]:
        shutil.rmtree(old)
    return final


def newest(root: Path) -> Path:
    """Return the folder of the newest complete checkpoint. Raises: SettingError if there is none."""
    found = newest_checkpoint(root)
    if found is None:
        raise SettingError(
            f"there is no complete checkpoint in {root}; expected a folder with a manifest.json, as a save leaves it; "
            "start a new run without --resume"
        )
    return found


def stream_spec(folder: Path) -> StreamSpec:
    """What the run streamed, from the replay stored with its checkpoint. Raises: SettingError if none was stored."""
    fields = {field["name"]: field for field in json.loads((folder / "manifest.json").read_text())["fields"]}
    if not fields:
        raise SettingError(
            f"{folder} holds no replay; wanted rows to look at; run with checkpoint.replay=true until the prefill is done"
        )
    obs = {
        name[4:]: ObsSpec(tuple(f["shape"][1:]), f["dtype"]) for name, f in fields.items() if name.startswith("obs.")
    }
    num_envs, action_dim = fields["action"]["shape"]
    return StreamSpec(num_envs, obs, action_dim)


def load_state(folder: Path) -> dict[str, Any]:
    """In host memory: on the GPU it would lie where the replay's slab wants a segment of its own."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def load_replay(folder: Path, replay: Replay, *, spec_digest: str) -> int:
    """Fill the ring from a checkpoint; a ring that became smaller keeps the newest rows. Returns the rows restored.

    Raises: SettingError if the checkpoint's stream is another one.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["spec_digest"] != spec_digest:
        raise SettingError(
            f"{folder} was written for stream {manifest['spec_digest']}, this run streams {spec_digest}; wanted the same "
            "observations, actions and number of environments; undo the overrides of env.* or start a new run"
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
        _read_rows(folder / "replay.bin", begin, target[:num_rows], row_bytes)
        offset += saved_rows * row_bytes
    replay.restore(num_rows)
    return num_rows


def random_state(replay: Replay, device: torch.device) -> dict[str, torch.Tensor]:
    """Every generator the learner draws from."""
    state = {"cpu": torch.get_rng_state(), "sampler": replay.generator.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, torch.Tensor], replay: Replay, device: torch.device) -> None:
    """The sampler's generator only where the replay lies on the kind of device it was saved from."""
    torch.set_rng_state(state["cpu"])
    if len(state["sampler"]) == len(replay.generator.get_state()):
        replay.generator.set_state(state["sampler"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _write_rows(path: Path, replay: Replay) -> list[dict[str, Any]]:
    """Every field's rows in order, block by block: a full ring is never copied whole. Returns what was written."""
    capacity, start = replay.layout.capacity, replay.first % replay.layout.capacity
    end = start + replay.num_rows
    spans = [(start, min(end, capacity))] + ([(0, end - capacity)] if end > capacity else [])
    fields = []
    with path.open("wb") as file:
        for entry in replay.layout.fields:
            view = replay.views.get(entry.key)
            fields.append({"name": entry.name, "shape": list(view.shape[1:]), "dtype": entry.dtype})
            step = max(1, BLOCK_BYTES // (math.prod(view.shape[1:]) * DTYPE_BYTES[entry.dtype]))
            for first, last in spans:
                for row in range(first, last, step):
                    view[row : min(row + step, last)].cpu().numpy().tofile(file)
        _sync(file)
    return fields


def _read_rows(path: Path, offset: int, target: torch.Tensor, row_bytes: int) -> None:
    """Rows from a byte offset of the file into `target`, block by block."""
    step = max(1, BLOCK_BYTES // row_bytes)
    with path.open("rb") as file:
        file.seek(offset)
        for row in range(0, len(target), step):
            part = target[row : row + step]
            raw = bytearray(file.read(len(part) * row_bytes))
            part.copy_(torch.frombuffer(raw, dtype=target.dtype).view(part.shape))


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        _sync(file)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself
    os.close(folder)
