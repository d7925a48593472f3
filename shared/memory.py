"""How much memory a process holds: what a week unattended is watched for. Torch-free at import.

Resident memory is counted without what belongs to a file or to shared memory: the replay lies in both processes, and
filling it is no growth. Child processes that the main thread started (workers, compilers) are counted with theirs; a page
that a forked one has not written yet lies in both and is counted once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

EVERY_S = 1.0  # between two measurements: /proc and the driver are not asked every tick
REST = 100  # times what a measurement took until the next: the kernel walks every page, some 25 ms a GB
ROLLUP = "smaps_rollup"  # in /proc/PID, of Linux 5.4 and newer


@dataclass(frozen=True)
class Memory:
    """What a process holds of its own; on a GPU also what its allocator reserved and what all processes use together.

    0 for what was not measured.
    """

    rss_bytes: int
    gpu_bytes: int = 0
    device_bytes: int = 0


class MemoryMeter:
    """This process's memory, measured anew at most once a second and in at most 1 % of the time; never waits for a GPU."""

    def __init__(
        self, device: str, *, whole_device: bool = True, measure: Callable[[str], Memory] | None = None
    ) -> None:
        """device: whose GPU memory is measured, such as "cuda:0"; "cpu": none. whole_device: other processes' too."""
        self._device, self._measure = device, measure or partial(_measure, whole_device=whole_device)
        self._measure_now()

    def read(self, *, anew: bool = False) -> Memory:
        """anew: measured in this call, whenever it last was."""
        if anew or time.monotonic() > self._rest_until:
            self._measure_now()
        return self._memory

    def _measure_now(self) -> None:
        began = time.monotonic()
        self._memory = self._measure(self._device)
        ended = time.monotonic()
        self._rest_until = ended + max(EVERY_S, REST * (ended - began))


def own_rss_bytes() -> int:
    """Anonymous resident memory of this process and of its child processes."""
    pid, children = os.getpid(), []
    with contextlib.suppress(OSError):  # a kernel without CONFIG_PROC_CHILDREN
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    if not children:
        return _unshared_bytes(pid)  # nobody has pages in common with it: the same number without the walk
    return sum(_proportional_bytes(process) for process in (pid, *children))


def gigabytes(num_bytes: int) -> float | None:
    """As metrics.jsonl has it; None for what was not measured."""
    return num_bytes / 1e9 if num_bytes else None


def _measure(device: str, *, whole_device: bool) -> Memory:
    rss = own_rss_bytes()
    if not device.startswith("cuda"):
        return Memory(rss)
    import torch

    reserved = torch.cuda.memory_reserved(device)
    if not whole_device:
        return Memory(rss, reserved)
    free, total = torch.cuda.mem_get_info(device)
    return Memory(rss, reserved, total - free)


def _proportional_bytes(pid: int) -> int:
    """Anonymous memory, each page divided by the number of processes it lies in; undivided where the kernel cannot say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{ROLLUP}").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return 1024 * int(line.split()[1])
    return _unshared_bytes(pid)


def _unshared_bytes(pid: int) -> int:
    """Resident memory that belongs to no file and to no shared memory."""
    try:
        _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    except OSError:  # it ended meanwhile
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
