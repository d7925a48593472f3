"""Timing on a noisy machine: the cases take turns, and a ratio compares measurements of the same turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


class Samples:
    """Seconds of every repetition of one case: wall time, and the CPU time of this process over all its threads."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def describe(self) -> dict[str, float]:
        """Return median, minimum and maximum in milliseconds."""
        return {
            **{f"wall_ms_{name}": value for name, value in spread(self.wall, 1e3).items()},
            **{f"cpu_ms_{name}": value for name, value in spread(self.cpu, 1e3).items()},
            "repetitions": len(self.wall),
        }


def spread(values: list[float], factor: float = 1.0) -> dict[str, float]:
    """Return median, minimum and maximum, each multiplied by a factor."""
    return {
        "median": round(statistics.median(values) * factor, 4),
        "min": round(min(values) * factor, 4),
        "max": round(max(values) * factor, 4),
    }


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all values does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def interleave(
    cases: dict[str, Callable[[], Any]], *, repetitions: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, Samples]:
    """Run every case once per turn, for `repetitions` turns, so that a busy second affects all cases alike.

    On a GPU a repetition ends when the device has finished its work.
    """
    samples = {name: Samples() for name in cases}
    for turn in range(warmup + repetitions):
        for name, case in cases.items():
            _synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            _synchronize(device)
            if turn >= warmup:
                samples[name].wall.append(time.perf_counter() - wall)
                samples[name].cpu.append(time.process_time() - cpu)
    return samples


def ratio(ours: Samples, peer: Samples, clock: str = "cpu") -> dict[str, float]:
    """Return how many times longer the peer takes, compared turn by turn: median, minimum and maximum."""
    pairs = zip(getattr(peer, clock), getattr(ours, clock), strict=True)
    return spread([theirs / max(own, 1e-12) for theirs, own in pairs])


def row(
    name: str, value: float | None, unit: str, *, peer: float | None = None, times: float | None = None, bar: str = ""
) -> dict[str, Any]:
    """Return one line of the table: our figure, the peer's, how many times better ours is, and the target."""
    return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": times, "bar": bar}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of a benchmark."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "ours", "peer", "unit", "ratio", "target"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit", "target") else "right")
    for line in rows:
        ratio_text = "" if line["ratio"] is None else f"{line['ratio']:.2f}x"
        table.add_row(line["name"], number(line["value"]), number(line["peer"]), line["unit"], ratio_text, line["bar"])
    Console(width=150).print(table)


def number(value: float | None) -> str:
    """Return a number with at most four significant digits and with separated thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
