"""Measure how much memory a process uses, so that a leak shows. This file imports torch only when it measures a GPU.

Resident memory is counted without files and without shared memory: both processes map the replay, and filling it must
not look like a leak. The processes that the main thread started (workers, compilers) are counted too. A forked process
shares with its parent the pages that neither has written since; such a page counts once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

EVERY_S = 1.0  # least time between two measurements, so that not every tick reads /proc and asks the driver
# Wait this many times a measurement's duration before the next one (1 % overhead): the kernel takes 25 ms for each GB.
REST = 100
ROLLUP = "smaps_rollup"  # a file in /proc/PID; it has the line Pss_Anon since Linux 5.4


@dataclass(frozen=True)
class Memory:
    """The memory of a process. A value that was not measured is 0."""

    rss_bytes: int  # resident memory of the process and its children
    gpu_bytes: int = 0  # GPU memory that torch reserved in this process
    device_bytes: int = 0  # GPU memory that all processes use together


class MemoryMeter:
    """Measures the memory of this process, at most once a second and in at most 1 % of the time.

    It never waits for a GPU.
    """

    def __init__(
        self, device: str, *, whole_device: bool = True, measure: Callable[[str], Memory] | None = None
    ) -> None:
        """Measure for the first time.

        device: the GPU whose memory is measured, such as "cuda:0"; none for "cpu".
        whole_device: measure `Memory.device_bytes` too.
        measure: replaces the measurement, in tests.
        """
        self._device, self._measure = device, measure or partial(_measure, whole_device=whole_device)
        self._measure_now()

    def read(self, *, now: bool = False) -> Memory:
        """Return the latest measurement. Measure again if it is old enough or if `now` is true."""
        if now or time.monotonic() > self._rest_until:
            self._measure_now()
        return self._memory

    def _measure_now(self) -> None:
        began = time.monotonic()
        self._memory = self._measure(self._device)
        ended = time.monotonic()
        self._rest_until = ended + max(EVERY_S, REST * (ended - began))


def own_rss_bytes() -> int:
    """Return the anonymous resident memory of this process and of the processes that it started."""
    pid, children = os.getpid(), []
    with contextlib.suppress(OSError):  # the kernel may be built without CONFIG_PROC_CHILDREN
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    if not children:
        return _unshared_bytes(pid)  # no process shares its pages, so this gives the same number faster
    return sum(_proportional_bytes(process) for process in (pid, *children))


def total_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own_groups: Path = Path("/proc/self/cgroup"),
) -> int | None:
    """Return how much memory this process may use: that of the machine, with its swap, or of its control group.

    None if it is not known. meminfo: lists the memory of the machine. cgroups: the tree of control groups, of version 1
    or 2. own_groups: names the groups of this process; the limit of each group above them counts too.
    """
    sizes = {}
    with contextlib.suppress(OSError):
        for line in meminfo.read_text().splitlines():
            name, _, size = line.partition(":")
            if name in ("MemTotal", "SwapTotal"):
                sizes[name] = 1024 * int(size.split()[0])
    if "MemTotal" not in sizes:
        return None
    return min([sum(sizes.values()), *_group_limits(cgroups, own_groups)])


def _group_limits(cgroups: Path, own_groups: Path) -> Iterator[int]:
    """Yield the memory limit of every control group above this process. A group without a limit is left out."""
    lines = ["0::/"]  # a container sees its own group as the root
    with contextlib.suppress(OSError):
        lines += own_groups.read_text().splitlines()
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: the text "max", so there is no limit
                yield int((folder / name).read_text())
            if folder == root:
                break


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that host memory could not be allocated."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator for host memory raises RuntimeError.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def gigabytes(num_bytes: int) -> float | None:
    """Return a size in GB, the unit of metrics.jsonl, or None if it was not measured."""
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
    """Return anonymous memory, where a page that n processes share counts as 1/n page.

    Without `smaps_rollup`, such a page counts as a whole one.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{ROLLUP}").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return 1024 * int(line.split()[1])
    return _unshared_bytes(pid)


def _unshared_bytes(pid: int) -> int:
    """Return the resident memory that belongs neither to a file nor to shared memory; 0 if the process has ended."""
    try:
        _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
