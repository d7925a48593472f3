"""Figures of the learner on a GPU that need no clock: kernels, GPU memory, allocations, waits and copied bytes.

    python -m benchmarks.counts                                                  # uncompiled; a minute
    python -m benchmarks.counts --compiled --json benchmarks/results/counts.json  # and compiled; a quarter of an hour
    python -m benchmarks.counts --compare benchmarks/results/counts.json          # an error if a figure has risen
    python -m benchmarks.counts --only presets --preset isaaclab mjlab

They are measured on a CUDA device. A fake one, which computes nothing and counts, is enough, and gave the figures of
the kept file: `python -m tests.fake_gpu python -m benchmarks.counts`. The output then names the device "fake GPU".

Parts:
    step      our captured gradient step with the sizes of TorchRL's recipe, in bfloat16
    presets   the captured step and the GPU memory of every file in configs/
    torchrl   TorchRL's Dreamer update, with networks of our sizes, layer by layer
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.count_cases import PRESETS, count_preset, count_step, count_torchrl
from benchmarks.counters import device_name

NAME = "counts"
PARTS = ("step", "presets", "torchrl")
FRAMES = (2500, 50_000)
# Counts must not rise at all. Memory depends a little on the version of torch and on what ran before.
TOLERANCES = {"reserved_mb": 0.02, "allocated_mb": 0.02}
Figures = dict[str, float]  # a figure by its name; for all of them less is better


def run(
    *, only: tuple[str, ...] = PARTS, frames: tuple[int, ...] = FRAMES, presets: tuple[str, ...] = (), compiled: bool
) -> dict[str, Any]:
    """Count everything that is asked for; with `compiled` also the compiled forms. Print each case when it is done."""
    cases: dict[str, Figures] = {}
    for name, count in _cases(only, frames, presets or tuple(PRESETS), compiled=compiled):
        cases[name] = count()
        print(f"{name}: " + ", ".join(f"{value:g} {key}" for key, value in cases[name].items()), flush=True)
    return {"device": device_name(), "cases": cases}


def _cases(
    only: tuple[str, ...], frames: tuple[int, ...], presets: tuple[str, ...], *, compiled: bool
) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Yield the name of each case and the function that counts it."""
    for form in (False, True) if compiled else (False,):
        word = "compiled" if form else "uncompiled"
        for size in frames if "step" in only else ():
            yield f"step of {size} frames, {word}", partial(count_step, size, compiled=form)
        for preset in presets if "presets" in only else ():
            yield f"preset {preset}, {word}", partial(count_preset, preset, compiled=form)
        for size in frames if "torchrl" in only else ():
            yield f"torchrl, {size} frames, {word}", partial(count_torchrl, size, compiled=form)


def risen(new: Mapping[str, Mapping[str, float]], old: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return one line for each figure that is in both and has risen. The figures of the peer may rise."""
    lines = []
    for case in new.keys() & old.keys():
        for key in new[case].keys() & old[case].keys():
            limit = old[case][key] * (1 + TOLERANCES.get(key, 0.0))
            if new[case][key] > limit and not case.startswith("torchrl"):
                lines.append(f"{case}: {key} rose from {old[case][key]:g} to {new[case][key]:g}")
    return sorted(lines)


def main() -> int:
    """Run the command line; return 1 if a figure has risen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--frames", nargs="+", type=int, default=FRAMES, help="batch sizes of `step` and `torchrl`")
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=())
    parser.add_argument("--compiled", action="store_true", help="count the compiled forms as well; takes minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file; other cases in it stay")
    parser.add_argument("--compare", type=Path, help="a file of --json; exit with 1 if a figure is higher now")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device; expected a GPU, or a fake one; run python -m tests.fake_gpu python -m "
            "benchmarks.counts in an environment with a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    old = json.loads(options.compare.read_text())["runtime"] if options.compare else None
    result = run(
        only=tuple(options.only),
        frames=tuple(options.frames),
        presets=tuple(options.preset),
        compiled=options.compiled,
    )
    print(f"counted on: {result['device']}")
    if options.json is not None:
        kept = json.loads(options.json.read_text())["runtime"]["cases"] if options.json.exists() else {}
        provenance.save(options.json, provenance.document(NAME, result | {"cases": kept | result["cases"]}))
    lines = risen(result["cases"], old["cases"]) if old is not None else []
    for line in lines:
        print(f"error: {line}; expected at most the kept figure; lower it again, or keep it with --json and say why")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
