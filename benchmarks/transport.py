"""Chunks and weights between two real processes: the cost of a chunk for the learner, and the latency of each way.

    python -m benchmarks.transport [--json PATH] [--quick] [--device cuda:0] [--only chunks latency]

Chunks: our ring (memfd, or CUDA IPC on a GPU; with the collector's writer, commits and grants) is compared with a
torch.multiprocessing queue of shared tensors, with a TensorDict through the same queue, and with a multiprocessing
queue that pickles arrays. In each case the chunk is in the receiver's replay memory in the end, and the sender may be
two chunks ahead. Every chunk contains its number, which the receiver checks. The four take turns.

Latency: the real collector process steps the pendulum. For weights it is the time from the call of `Publisher.publish`
to the adopted policy. For commits it is the time from just before the send to the end of a `Replay.sample` that can
draw from the chunk.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.chunk_streams import KINDS, ChunkShape, Stream
from benchmarks.pair import LearnerEnd, pair_settings
from benchmarks.provenance import document, save
from benchmarks.timing import percentile, row, show, spread

SHAPES = {
    "3 MB": ChunkShape(256, 50, 48),
    "13 MB": ChunkShape(1024, 50, 48),
    "pixels, 12 MB": ChunkShape(20, 50, 0),
}
QUICK = {"tiny": ChunkShape(8, 10, 48)}


def measure_chunks(shape: ChunkShape, *, device: str, rounds: int, chunks: int) -> dict[str, Any]:
    """Measure every kind of stream in turn: chunks/s, GB/s, and the receiver's CPU milliseconds per chunk."""
    # the ring is last: it waits for its sender, and the other senders import their modules meanwhile
    streams = {kind: Stream(kind, shape, device=device) for kind in reversed(KINDS)}
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        for turn in range(rounds + 1):
            for kind, stream in streams.items():
                figures = stream.receive(chunks)
                if turn:  # the first round includes page faults and is not counted
                    turns[kind].append(figures)
    finally:
        for stream in streams.values():
            stream.close()
    result: dict[str, Any] = {"num_bytes": shape.num_bytes, "chunks": chunks, "rounds": rounds}
    for kind, figures in turns.items():
        result[kind] = {key: spread([turn[key] for turn in figures]) for key in figures[0]}
        if kind != "ring":
            for key in ("wall_ms", "receiver_cpu_ms"):
                pairs = zip(figures, turns["ring"], strict=True)
                result[kind][f"ratio_{key}"] = spread([peer[key] / max(own[key], 1e-9) for peer, own in pairs])
    return result


def measure_latency(*, device: str, pushes: int, step_s: float, envs: int, ticks: int) -> dict[str, Any]:
    """Measure the latency of both ways in milliseconds.

    `step_s` is how long the learner sleeps between two passes of its loop, in place of a gradient step.
    """
    settings = pair_settings("quickstart", [f"env.num_envs={envs}"], envs=envs, ticks=ticks)
    published: dict[int, float] = {}
    sampled: dict[int, float] = {}
    with LearnerEnd(settings, device=device, module="benchmarks.traced_collector") as end:
        assert end.publisher is not None
        due, deadline = time.monotonic(), time.monotonic() + 60.0 + pushes * (0.1 + step_s)
        while len(published) < pushes or len(sampled) < pushes:
            assert time.monotonic() < deadline, (len(published), len(sampled))
            commits = end.serve()
            if time.monotonic() >= due and len(published) < pushes:
                began = time.monotonic()
                end.publisher.publish(step=0)
                published[end.publisher.version] = began
                due = began + 0.013  # no multiple of the time of a tick or a pass
            end.replay.sample(50, ticks)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            sampled |= dict.fromkeys((commit.seq for commit in commits), time.monotonic())
            if step_s:
                time.sleep(step_s)
            elif not commits:
                end.link.wait(0.001)
        _drain(end)
        trace = end.trace()
    push = [trace["adopt"][version] - began for version, began in published.items() if version in trace["adopt"]]
    commit = [when - trace["commit"][seq] for seq, when in sampled.items() if seq in trace["commit"]]
    return {"push": _describe(push), "commit": _describe(commit), "superseded": len(published) - len(push)}


def _drain(end: LearnerEnd) -> None:
    """Let the collector finish the granted chunks, so that its trace is complete."""
    until = time.monotonic() + 10.0
    while end.replay.num_granted and time.monotonic() < until:
        end.serve(grant=False)
        end.link.wait(0.01)


def _describe(seconds: list[float]) -> dict[str, float]:
    return {
        "count": len(seconds),
        "median_ms": round(statistics.median(seconds) * 1e3, 3),
        "p99_ms": round(percentile(seconds, 0.99) * 1e3, 3),
        "max_ms": round(max(seconds) * 1e3, 3),
    }


def run(*, quick: bool = False, device: str = "cpu", only: tuple[str, ...] = ("chunks", "latency")) -> dict[str, Any]:
    """Measure the parts that `only` names."""
    result: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "chunks": {}, "latency": {}}
    if "chunks" in only:
        rounds, chunks = (1, 4) if quick else (5, 30)
        for name, shape in (QUICK if quick else SHAPES).items():
            result["chunks"][name] = measure_chunks(shape, device=device, rounds=rounds, chunks=chunks)
    if "latency" in only:
        for step_s in (0.0,) if quick else (0.0, 0.02):
            figures = measure_latency(device=device, pushes=5 if quick else 300, step_s=step_s, envs=64, ticks=16)
            result["latency"]["idle learner" if not step_s else f"{step_s * 1e3:.0f} ms steps"] = figures
    result["rows"] = _rows(result)
    return result


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for name, figures in result["chunks"].items():
        ring = figures["ring"]
        lines.append(row(f"ring, {name} chunks", ring["chunks_per_s"]["median"], "chunks/s"))
        lines.append(row(f"ring, {name} chunks", ring["gb_per_s"]["median"], "GB/s"))
        for kind in KINDS[1:]:
            for key, unit in (("wall_ms", "ms"), ("receiver_cpu_ms", "learner cpu ms")):
                peer, times = figures[kind][key]["median"], figures[kind][f"ratio_{key}"]["median"]
                label = f"ring, {name} chunks, against {kind}"
                lines.append(row(label, ring[key]["median"], unit, peer=peer, times=times))
    for name, figures in result["latency"].items():
        for key, words in (("push", "published -> adopted"), ("commit", "commit sent -> sampled")):
            lines.append(row(f"{words}, median, {name}", figures[key]["median_ms"], "ms"))
            lines.append(row(f"{words}, p99, {name}", figures[key]["p99_ms"], "ms"))
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--device", default="cpu", help="device of the gathered chunks and of the replay")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the receiver")
    parser.add_argument("--only", nargs="+", choices=("chunks", "latency"), default=("chunks", "latency"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = run(quick=options.quick, device=options.device, only=tuple(options.only))
    save(options.json, document("transport", result))
    show("transport", result["rows"])


if __name__ == "__main__":
    main()
