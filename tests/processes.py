"""Wait for what the processes that a test started do, with a deadline."""

from __future__ import annotations

import time
from pathlib import Path

DEADLINE_S = 120.0  # generous: other programs may use the machine, and no test checks a speed


def wait_for_file(path: Path) -> None:
    """Return once the file exists. Raises: AssertionError after DEADLINE_S."""
    end = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear within {DEADLINE_S} s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def mapped_shared_memory(pid: int) -> set[str]:
    """Return the files in /dev/shm that a process maps. Other programs' files there do not count."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


def wait_until_gone(pid: int) -> None:
    """Return once the process has ended. Raises: AssertionError after DEADLINE_S."""
    end = time.monotonic() + DEADLINE_S
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} still runs after {DEADLINE_S} s"
        time.sleep(0.01)
