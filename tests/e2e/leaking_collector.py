"""The real collector with a simulator that leaks memory, 1 MB per tick, in its first NUM incarnations.

Run as `python leaking_collector.py NUM --run-dir DIR ...`; otherwise like `python -m collector_proc`.
"""

from __future__ import annotations

import sys
from typing import Any

import collector_proc.__main__ as entry
from collector_proc.simulators import ending

LEAK_BYTES = 1_000_000  # per tick
_leaked: list[bytes] = []


def leak(simulator: Any) -> Any:
    """Return the simulator; from now on each of its steps leaks memory."""
    step = simulator.step

    def leaking_step(action: Any) -> Any:
        _leaked.append(b"\1" * LEAK_BYTES)
        return step(action)

    simulator.step = leaking_step
    return simulator


def main() -> int:
    """Run the collector."""
    build, num_leaking = entry.build_simulator, int(sys.argv.pop(1))
    if int(sys.argv[sys.argv.index("--incarnation") + 1]) < num_leaking:
        entry.build_simulator = lambda *args, **kwargs: leak(build(*args, **kwargs))
    return entry.main()


if __name__ == "__main__":
    ending.run(main)
