"""Do all Triton kernels of the compiled steps compile for the GPUs that people have? Runs without a GPU.

    python -m tests.fake_gpu python -m benchmarks.triton_kernels [--preset isaaclab ...]

For every file in configs/ that compiles, the captured step is built, and each of its kernels is translated to machine
code by ptxas for sm_80 (A100), sm_90 (H100) and sm_100 (B200). The compiler chooses block sizes for the GPU that it
sees, so on another GPU they may be others.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.count_cases import PRESETS, count_preset
from benchmarks.counters import device_name
from shared.compose import compose

TARGETS = (80, 90, 100)
WARP = 32


class TargetCheck:
    """Stands in for `triton.compile`, and compiles every kernel for all targets."""

    def __init__(self) -> None:
        self.compiled: Counter[int] = Counter()
        self.failures: list[str] = []
        self._known: set[str] = set()
        self._compile = importlib.import_module("triton").compile
        self._target = importlib.import_module("triton.backends.compiler").GPUTarget

    def __call__(self, source: Any, **options: Any) -> Any:
        """Compile a kernel for the present GPU as usual, after compiling it for all targets if it is new."""
        key = f"{source.hash()} {options.get('options')}"
        if key not in self._known:
            self._known.add(key)
            for capability in TARGETS:
                try:
                    self._compile(source, **options | {"target": self._target("cuda", capability, WARP)})
                    self.compiled[capability] += 1
                except Exception as error:  # every failure is reported at the end
                    reason = (str(error).splitlines() or [""])[0]
                    self.failures.append(f"{source.name} for sm_{capability}: {type(error).__name__}: {reason}")
        return self._compile(source, **options)


def check(preset: str) -> TargetCheck:
    """Build the captured step of a preset and return what was compiled for it."""
    found = TargetCheck()
    with fresh_cache(), patch("torch._inductor.runtime.triton_heuristics.triton.compile", found):
        count_preset(preset, compiled=True)
    return found


def main() -> int:
    """Check every preset; return 1 if a kernel does not compile for a target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compiling = [name for name in sorted(PRESETS) if compose(name).optimization.compile.enabled]
    parser.add_argument("--preset", nargs="+", choices=compiling, default=compiling)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; expected a GPU, or a fake one; run it with python -m tests.fake_gpu")
        return 2
    failures: list[str] = []
    for preset in options.preset:
        found = check(preset)
        counts = ", ".join(f"{count} for sm_{capability}" for capability, count in sorted(found.compiled.items()))
        print(f"{preset}: {counts}; {len(found.failures)} failures", flush=True)
        failures += [f"{preset}: {failure}" for failure in found.failures]
    print("\n".join([f"compiled on: {device_name()}", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
