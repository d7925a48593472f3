"""The real collector over a simulator that loses 1 MB a tick in its first NUM incarnations.

`python leaking_collector.py NUM --run-dir DIR ...`
"""

from __future__ import annotations

import sys
from typing import Any

import collector_proc.__main__ as entry
from collector_proc.simulators import ending

LEAK = 1_000_000  # bytes a tick
_lost: list[bytes] = []


def leak(simulator: Any) -> Any:
    step = simulator.step

    def leaking_step(action: Any) -> Any:
        _lost.append(b"\1" * LEAK)
        return step(action)

    simulator.step = leaking_step
    return simulator


def main() -> int:
    build, num_leaking = entry.build_simulator, int(sys.argv.pop(1))
    if int(sys.argv[sys.argv.index("--incarnation") + 1]) < num_leaking:
        entry.build_simulator = lambda *args, **kwargs: leak(build(*args, **kwargs))
    return entry.main()


if __name__ == "__main__":
    ending.run(main)
