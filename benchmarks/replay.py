"""Writing to and sampling from the replay, compared with TorchRL's buffer at the same shapes, in turns.

    python -m benchmarks.replay [--json PATH] [--quick] [--device cuda:0] [--threads 1] [--rows recipe]

There are 1024 environments, chunks of 50 ticks and one million rows. Trajectories are as long as the buffer.

    write     a gathered chunk into the ring, against `extend` with a gathered chunk
    sample    windows of 50 steps, against TorchRL's SliceSampler with its defaults, with the settings of the Dreamer
              recipe (strict_length=False), and in its best case (strict_length and cache_values)

    --rows stream    a row is what our collector sends: 48 observations, 12 actions, reward, flags
    --rows recipe    a row is as large as a frame of TorchRL's recipe: two observations, belief, stochastic state
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SliceSampler

from benchmarks.provenance import document, save
from benchmarks.timing import interleave, ratio, row, show
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from learner_proc.replay import Replay
from shared.handover import create_memfd_slab
from shared.stream import DTYPE_BYTES, ObsSpec, StreamSpec, plan_layout

logging.getLogger("torchrl").setLevel(logging.WARNING)  # torchrl logs a line for every storage
LENGTH = 50  # steps in a window, ticks in a chunk
TRAJECTORY = ("collector", "traj_ids")
ROWS = {"stream": {"policy": 48}, "recipe": {"policy": 48, "policy_next": 48, "belief": 200, "stoch": 30}}
SAMPLERS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "strict_length=False": {"strict_length": False},
    "strict, cached": {"strict_length": True, "cache_values": True},
}
BARS = {2500: ">= 2x", 50_000: ">= 1x"}


class Ours:
    """The ring, filled to its capacity, and the collector's writer."""

    def __init__(self, spec: StreamSpec, capacity: int, chunk: TensorDict, *, device: torch.device) -> None:
        layout = plan_layout(spec, capacity)
        if device.type == "cuda":
            slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        else:
            slab, descriptor = create_memfd_slab(layout.num_bytes)
            os.close(descriptor)  # the mapping stays
        self.replay = Replay(slab, layout, ticks_per_chunk=LENGTH, seed=0, device=device)
        self.writer = ChunkWriter(self.replay.views, layout, ticks=LENGTH, device=device)
        self._arrivals = [_arrival(chunk[:, tick]) for tick in range(LENGTH)]
        self._actions = [chunk["action"][:, tick].contiguous() for tick in range(LENGTH)]
        self.gather()
        for _ in range(capacity // LENGTH):
            self.write()

    def gather(self) -> None:
        """Copy rows into the stage one after the other, as the collector does between ticks."""
        self.writer.num_rows = 0
        for arrival, action in zip(self._arrivals, self._actions, strict=True):
            self.writer.add(arrival, action, 1)

    def write(self) -> None:
        """Grant rows, copy the gathered chunk into the ring, and commit it."""
        self.writer.num_rows = LENGTH
        grant = self.replay.grant()
        self.writer.write(grant)
        self.writer.wait()  # on a GPU the copies run on a separate stream
        self.replay.commit(grant)


class Peer:
    """TorchRL's buffer for slices, filled to its capacity. `options` are those of the SliceSampler."""

    def __init__(self, capacity: int, chunk: TensorDict, frames: int, *, device: torch.device, **options: Any) -> None:
        num_envs = chunk.shape[0]
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity * num_envs, ndim=2, device=device),
            sampler=SliceSampler(slice_len=LENGTH, traj_key=TRAJECTORY, **options),
            batch_size=frames,
        )
        for _ in range(capacity // LENGTH):
            self.buffer.extend(chunk)
        self._chunk, self._gathered = chunk, chunk.clone()
        self._ticks = [chunk[:, tick].contiguous() for tick in range(LENGTH)]

    def gather(self) -> None:
        """Stack ticks into existing memory, as TorchRL's collector does at the end of a chunk."""
        torch.stack(self._ticks, 1, out=self._gathered)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def write(self) -> None:
        """Add a gathered chunk to the buffer."""
        self.buffer.extend(self._chunk)

    def sample(self) -> TensorDict:
        """Return sampled windows."""
        return self.buffer.sample()


def make_chunk(spec: StreamSpec, *, device: torch.device) -> TensorDict:
    """Return a chunk (E, 50) of random rows. Each environment has one trajectory, as long as the buffer."""
    num_envs = spec.num_envs
    chunk = TensorDict({}, [num_envs, LENGTH], device=device)
    for entry in spec.fields():
        shape = (num_envs, LENGTH, *entry.shape)
        dtype = getattr(torch, entry.dtype)
        floating = dtype == torch.float32
        chunk[entry.key] = (
            torch.randn(shape, device=device) if floating else torch.zeros(shape, dtype=dtype, device=device)
        )
    chunk[TRAJECTORY] = torch.arange(num_envs, device=device)[:, None].expand(num_envs, LENGTH).clone()
    chunk["next", "done"] = torch.zeros(num_envs, LENGTH, 1, dtype=torch.bool, device=device)
    return chunk


def measure_write(ours: Ours, peer: Peer, *, repetitions: int, device: str) -> dict[str, Any]:
    """Time writing a gathered chunk into the memory that is sampled, and gathering its ticks."""
    cases = {"ours": ours.write, "torchrl": peer.write, "ours gather": ours.gather, "torchrl gather": peer.gather}
    samples = interleave(cases, repetitions=repetitions, device=device)
    result: dict[str, Any] = {name: sample.describe() for name, sample in samples.items()}
    for suffix in ("", " gather"):
        for clock in ("cpu", "wall"):
            result[f"ratio_{clock}{suffix}"] = ratio(samples[f"ours{suffix}"], samples[f"torchrl{suffix}"], clock)
    return result


def measure_sample(ours: Ours, peers: dict[str, Peer], frames: int, *, repetitions: int, device: str) -> dict[str, Any]:
    """Time sampling windows of 50 steps, `frames` steps in total; on a GPU also count host synchronisations."""
    cases = {"ours": lambda: ours.replay.sample(frames // LENGTH, LENGTH)}
    cases |= {name: peer.sample for name, peer in peers.items()}
    samples = interleave(cases, repetitions=repetitions, device=device)
    result: dict[str, Any] = {name: sample.describe() for name, sample in samples.items()}
    for name in peers:
        result[name]["ratio_cpu"] = ratio(samples["ours"], samples[name])
        result[name]["ratio_wall"] = ratio(samples["ours"], samples[name], "wall")
        result[name]["frames"] = peers[name].sample().shape[0]
    if device.startswith("cuda"):
        for name, case in cases.items():
            result[name]["host_synchronisations"] = count_synchronisations(case)
    return result


def count_synchronisations(case: Callable[[], Any]) -> int:
    """Return how often a call makes the host wait for the GPU, by counting torch's warnings."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            case()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def run(*, quick: bool = False, device: str = "cpu", rows: str = "stream") -> dict[str, Any]:
    """Measure both sides at both batch sizes; with `quick`, 64 environments for a few seconds."""
    num_envs, capacity = (64, 4 * LENGTH) if quick else (1024, 1_000_000 // 1024 // LENGTH * LENGTH)
    spec = StreamSpec(num_envs, {name: ObsSpec((size,), "float32") for name, size in ROWS[rows].items()}, 12)
    where = torch.device(device)
    chunk = make_chunk(spec, device=where)
    ours, repetitions = Ours(spec, capacity, chunk, device=where), 3 if quick else 15
    result: dict[str, Any] = {
        "num_envs": num_envs,
        "capacity_rows": capacity * num_envs,
        "bytes_per_row": sum(
            DTYPE_BYTES[entry.dtype] * math.prod(entry.shape) for entry in spec.fields() if entry.per_env
        ),
        "device": device,
        "threads": torch.get_num_threads(),
        "sample": {},
    }
    for frames in (100,) if quick else (2500, 50_000):
        peers = {name: Peer(capacity, chunk, frames, device=where, **options) for name, options in SAMPLERS.items()}
        if "write" not in result:
            result["write"] = measure_write(ours, peers["as it comes"], repetitions=repetitions, device=device)
        result["sample"][str(frames)] = measure_sample(ours, peers, frames, repetitions=repetitions, device=device)
    result["rows"] = _rows(result, rows)
    return result


def _rows(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    clock = "wall" if result["device"].startswith("cuda") else "cpu"
    unit, median = f"{clock} ms", f"{clock}_ms_median"
    write, chunk = result["write"], f"50-tick chunk of {result['num_envs']} envs, {kind} rows"
    lines = []
    for words, suffix, bar in (
        (f"write, {chunk}, against extend", "", ">= 2x"),
        (f"gather, {chunk}, against stacking", " gather", ""),
    ):
        own, peer = write[f"ours{suffix}"][median], write[f"torchrl{suffix}"][median]
        lines.append(row(words, own, unit, peer=peer, times=write[f"ratio_{clock}{suffix}"]["median"], bar=bar))
    for frames, figures in result["sample"].items():
        for name in SAMPLERS:
            if "host_synchronisations" in figures[name]:
                counts = [figures[side]["host_synchronisations"] for side in ("ours", name)]
                label = f"sample, {int(frames):,} frames, SliceSampler {name}"
                lines.append(row(label, counts[0], "waits for the GPU", peer=counts[1]))
            bar = BARS.get(int(frames), "") if name == "as it comes" else ""
            lines.append(
                row(
                    f"sample, {int(frames):,} frames, {kind} rows, SliceSampler {name}",
                    *(figures["ours"][median], unit),
                    peer=figures[name][median],
                    times=figures[name][f"ratio_{clock}"]["median"],
                    bar=bar,
                )
            )
    return lines


def _arrival(rows: TensorDict) -> Arrival:
    """Return one tick of a chunk in the form that a simulator returns."""
    obs = {name: entry.contiguous() for name, entry in rows.get("obs").items()}
    return Arrival(obs, *(rows[name].contiguous() for name in ("reward", "is_first", "is_last", "is_terminal")))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--device", default="cpu", help="device of both buffers")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rows", choices=sorted(ROWS), default="stream", help="the content of a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = run(quick=options.quick, device=options.device, rows=options.rows)
    save(options.json, document("replay", result))
    show("replay", result["rows"])


if __name__ == "__main__":
    main()
