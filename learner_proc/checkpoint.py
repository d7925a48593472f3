"""Checkpoints: one folder each, complete or absent, and `latest` naming the newest.

checkpoints/00001200/state.pt      networks, optimisers, counters, random states
                     replay.pt     the rows in the sampler's reach, oldest first (checkpoint.replay=true)
                     manifest.json stream digest, row count, sizes; written last
checkpoints/latest                 "00001200"
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from learner_proc.replay import Replay
from shared.errors import SettingError


def save(root: Path, step: int, state: dict[str, Any], replay: Replay | None, *, spec_digest: str, keep: int) -> Path:
    """Write a checkpoint beside its final name, sync it, rename it, then delete all but the `keep` newest."""
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"{step:08d}", root / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write(partial / "state.pt", state)
    manifest = {"step": step, "spec_digest": spec_digest, "replay_rows": 0}
    if replay is not None and replay.num_rows > 0:
        _write(partial / "replay.pt", _pieces(replay))
        manifest["replay_rows"] = replay.num_rows
    manifest["bytes"] = {path.name: path.stat().st_size for path in partial.iterdir()}
    _replace_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _replace_text(root / "latest", final.name)
    for old in sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdigit())[:-keep]:
        shutil.rmtree(old)
    return final


def newest(root: Path) -> Path:
    """The folder `latest` names. Raises: SettingError if there is no complete checkpoint."""
    latest = root / "latest"
    folder = root / latest.read_text().strip() if latest.exists() else None
    if folder is None or not (folder / "manifest.json").exists():
        raise SettingError(
            f"no complete checkpoint under {root}; wanted one named by {latest}; start a new run without --resume"
        )
    return folder


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    return torch.load(folder / "state.pt", map_location=device, weights_only=True)


def load_replay(folder: Path, replay: Replay, *, spec_digest: str) -> int:
    """Fill the ring from a checkpoint, newest rows first kept if the ring became smaller; returns the rows restored.

    Raises: SettingError if the checkpoint's stream is another one.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["spec_digest"] != spec_digest:
        raise SettingError(
            f"{folder} was written for stream {manifest['spec_digest']}, this run streams {spec_digest}; wanted the same "
            "observations, actions and number of environments; undo the overrides of env.* or start a new run"
        )
    if manifest["replay_rows"] == 0:
        return 0
    pieces = torch.load(folder / "replay.pt", map_location="cpu", weights_only=True, mmap=True)
    num_rows = min(manifest["replay_rows"], replay.layout.capacity)
    num_rows -= num_rows % replay.ticks_per_chunk
    for entry in replay.layout.fields:
        target = replay.views[entry.key]
        skip, at = manifest["replay_rows"] - num_rows, 0
        for piece in pieces[entry.name]:
            part = piece[min(skip, len(piece)) :]
            skip -= len(piece) - len(part)
            target[at : at + len(part)].copy_(part)
            at += len(part)
    replay.restore(num_rows)
    return num_rows


def random_state(replay: Replay, device: torch.device) -> dict[str, torch.Tensor]:
    """Every generator the learner draws from."""
    state = {"cpu": torch.get_rng_state(), "sampler": replay.generator.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, torch.Tensor], replay: Replay, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    replay.generator.set_state(state["sampler"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _pieces(replay: Replay) -> dict[str, list[torch.Tensor]]:
    """Per field the rows in order: one contiguous piece, or two where the ring wraps."""
    capacity = replay.layout.capacity
    start, end = replay.first % capacity, replay.first % capacity + replay.num_rows
    spans = [(start, min(end, capacity))] + ([(0, end - capacity)] if end > capacity else [])
    fields = {entry.name: replay.views[entry.key] for entry in replay.layout.fields}
    return {name: [view[a:b].cpu().clone() for a, b in spans] for name, view in fields.items()}


def _write(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
