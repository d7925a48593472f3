"""Run every benchmark that this machine can run, and print one table at the end.

    python -m benchmarks [--json PATH] [--quick] [--only replay transport ...]

On a machine with CUDA the GPU is measured; the replay and the transport are measured on the CPU as well. The output
names every benchmark that was left out, with the reason. `--quick` uses tiny sizes to check that everything runs; its
figures mean nothing.
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

# The arguments of each module's `run` besides `device`: for a full run, and for --quick.
BENCHMARKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replay": ({}, {"quick": True}),
    "transport": ({}, {"quick": True}),
    "collector": ({}, {"quick": True}),
    "end_to_end": ({}, {"quick": True}),
    "learner": ({}, {"frames": (50,), "compiled": (False,), "repetitions": 2, "tiny": True}),
    "peer_torchrl": ({}, {"frames": (50,), "modes": ("eager",), "repetitions": 2, "tiny": True}),
}
ON_BOTH = ("replay", "transport")  # measured on the CPU even if there is a GPU


def run(*, quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmarks and return their figures, the rows of the table, what was left out and what failed.

    The figures are keyed by benchmark: `replay`, `replay on the CPU`, and so on.
    """
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
            except Exception as error:  # a failure is reported at the end and does not stop the others
                traceback.print_exc()
                failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            rows += [line | {"name": f"{label}: {line['name']}"} for line in rows_of(module, result)]
            left_out |= _left_out(label, result)
            figures[label] = result | {"seconds": round(time.monotonic() - began, 1)}
    return {"benchmarks": figures, "left_out": left_out, "failed": failed, "rows": rows}


def devices_of(name: str, *, gpu: bool) -> tuple[str, ...]:
    """Return the devices on which a benchmark runs on this machine."""
    if not gpu:
        return ("cpu",)
    return ("cuda:0", "cpu") if name in ON_BOTH else ("cuda:0",)


def rows_of(module: Any, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a benchmark's lines of the table. They are in its result, or its module's `rows` makes them."""
    return result["rows"] if "rows" in result else module.rows(result)


def _left_out(label: str, result: dict[str, Any]) -> dict[str, str]:
    found = result.get("left_out", {})
    pairs = found.items() if isinstance(found, dict) else (line.split(": ", 1) for line in found)
    return {f"{label}: {what}": why for what, why in pairs}


def main() -> int:
    """Run the command line; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), default=(), help="run only these")
    options = parser.parse_args()
    torch.set_num_threads(1)  # both sides of a comparison have one thread
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
