"""Every benchmark this machine can run, one table at the end.

    python -m benchmarks [--json PATH] [--quick] [--only replay transport ...]

On a machine with CUDA the GPU is measured, and the replay and the transport on the CPU besides. What is left out is said,
with the reason. `--quick`: tiny sizes, to see that everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import document, save
from benchmarks.timing import show

# What `run` of each module takes besides `device`, in earnest and quick.
BENCHMARKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replay": ({}, {"quick": True}),
    "transport": ({}, {"quick": True}),
    "collector": ({}, {"quick": True}),
    "end_to_end": ({}, {"quick": True}),
    "learner": ({}, {"frames": (50,), "compiled": (False,), "repetitions": 2, "tiny": True}),
    "peer_torchrl": ({}, {"frames": (50,), "modes": ("eager",), "repetitions": 2, "tiny": True}),
}
ON_BOTH = ("replay", "transport")  # beside a GPU measured on the CPU too


def run(*, quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Figures by benchmark (`replay`, `replay on the CPU`, ...), rows of the one table, what was left out, what failed."""
    gpu, figures, rows = torch.cuda.is_available(), {}, []
    left_out: dict[str, str] = {} if gpu else {"every figure of a GPU": "no CUDA device"}
    failed: dict[str, str] = {}
    for name, (full, smoke) in BENCHMARKS.items():
        if only and name not in only:
            continue
        for device in devices_of(name, gpu=gpu):
            label, began = f"{name} on the CPU" if gpu and device == "cpu" else name, time.monotonic()
            print(f"{label} ...", flush=True)
            module = importlib.import_module(f"benchmarks.{name}")
            try:
                result = module.run(device=device, **(smoke if quick else full))
            except Exception as error:  # one that fails is named at the end and costs the others nothing
                traceback.print_exc()
                failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            rows += [line | {"name": f"{label}: {line['name']}"} for line in rows_of(module, result)]
            left_out |= _left_out(label, result)
            figures[label] = result | {"seconds": round(time.monotonic() - began, 1)}
    return {"benchmarks": figures, "left_out": left_out, "failed": failed, "rows": rows}


def devices_of(name: str, *, gpu: bool) -> tuple[str, ...]:
    """Where a benchmark runs on this machine."""
    if not gpu:
        return ("cpu",)
    return ("cuda:0", "cpu") if name in ON_BOTH else ("cuda:0",)


def rows_of(module: Any, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A benchmark's lines of the table: kept with its figures, or made from them by its own `rows`."""
    return result["rows"] if "rows" in result else module.rows(result)


def _left_out(label: str, result: dict[str, Any]) -> dict[str, str]:
    found = result.get("left_out", {})
    pairs = found.items() if isinstance(found, dict) else (line.split(": ", 1) for line in found)
    return {f"{label}: {what}": why for what, why in pairs}


def main() -> int:
    """Exit code 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="keep every figure here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), default=(), help="these alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # where a benchmark compares, both sides have one thread
    result = run(quick=options.quick, only=options.only)
    save(options.json, document("all", result))
    show("Tandem's benchmarks", result["rows"])
    for what, why in result["left_out"].items():
        print(f"left out: {what}: {why}")
    for what, why in result["failed"].items():
        print(f"FAILED: {what}: {why}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
