"""What a run uses up: disk, memory and GPU memory, with a forecast from the slope. Torch-free.

A forecast is made from the lowest values in parts of the last hours, so that files and memory that come and go do not
disturb it. The replay in host memory fills its pages in the first hours and then stops. So its unfilled part counts as
used from the beginning, and its filling is no slope.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.events import Events

EVERY_S = 60.0  # time between two measurements
WINDOW_S = 6 * 3600.0  # the time from which a forecast is made
SHORTEST_S = 1200.0  # no forecast from less
NUM_PARTS = 8
NEARLY_FULL = 0.02  # below this share of free space, a warning needs no slope
GPU_QUERY = ("nvidia-smi", "--query-gpu=uuid,memory.free,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Space:
    """How many bytes of something are free, and how many there are."""

    free: int
    total: int


class Forecast:
    """Predicts when something runs out. Times are seconds of any clock that goes on evenly."""

    def __init__(self) -> None:
        self._free: deque[tuple[float, float]] = deque()

    def add(self, at: float, free: float) -> None:
        """Add a measurement."""
        self._free.append((at, free))
        while self._free[0][0] < at - WINDOW_S:
            self._free.popleft()

    def hours_left(self) -> float | None:
        """Return after how many hours nothing is free, or None if no decline is visible."""
        if not self._free or self._free[-1][0] - self._free[0][0] < SHORTEST_S:
            return None
        began, ended = self._free[0][0], self._free[-1][0]
        parts: dict[int, tuple[float, float]] = {}  # the lowest value of each part of the time
        for at, free in self._free:
            part = min(NUM_PARTS - 1, int(NUM_PARTS * (at - began) / (ended - began)))
            parts[part] = min(parts.get(part, (at, free)), (at, free), key=lambda one: one[1])
        if len(parts) < NUM_PARTS:
            return None
        times, lowest = zip(*parts.values(), strict=True)
        slope, start = linear_regression(times, lowest)
        errors = fmean(abs(start + slope * at - free) for at, free in zip(times, lowest, strict=True))
        if slope >= 0 or -slope * (ended - began) < 4 * errors:
            return None
        return max(0.0, lowest[-1] / -slope / 3600.0)


@dataclass
class Watched:
    """One thing that can run out. `warned_hours`: the forecast of the last warning."""

    name: str
    space: Space
    forecast: Forecast = field(default_factory=Forecast)
    hours_left: float | None = None
    warned_hours: float | None = None
    is_nearly_full: bool = False

    def measure(self, at: float, space: Space) -> None:
        """Add a measurement."""
        self.space = space
        self.forecast.add(at, space.free)
        self.hours_left = self.forecast.hours_left()

    def warning(self, warn_hours: float) -> str | None:
        """Return what the user should know now, or None. It is repeated when half of the time has passed."""
        free = f"{self.space.free / 1e9:.1f} of {self.space.total / 1e9:.1f} GB of {self.name} are free"
        was_nearly_full, self.is_nearly_full = self.is_nearly_full, self.space.free < NEARLY_FULL * self.space.total
        if self.is_nearly_full and not was_nearly_full:
            return f"only {free}"
        if self.hours_left is None or self.hours_left > warn_hours:
            if self.hours_left is None or self.hours_left > 2 * warn_hours:
                self.warned_hours = None
            return None
        if self.warned_hours is not None and self.hours_left > self.warned_hours / 2:
            return None
        self.warned_hours = self.hours_left
        return f"{free}, and at the present pace none is left in about {self.hours_left:.1f} hours"

    def facts(self) -> dict[str, Any]:
        """Return the state for status.json."""
        hours = None if self.hours_left is None else round(self.hours_left, 2)
        return {"free_bytes": self.space.free, "total_bytes": self.space.total, "hours_left": hours}


class ResourceWatch:
    """Measures once a minute and warns hours before something runs out. It never waits for another process."""

    def __init__(
        self,
        run_dir: Path,
        *,
        warn_hours: float,
        gpus: Sequence[str],
        events: Events,
        log: FilteringBoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """gpus: the identifiers of the GPUs that the run uses. log: gets every warning."""
        self._run_dir, self._warn_hours, self._events, self._log, self._clock = run_dir, warn_hours, events, log, clock
        self._gpus = GpuQuery(gpus)
        self._measured_at = -EVERY_S
        self.watched: dict[str, Watched] = {}

    def check(self, learner_pid: int) -> None:
        """Measure if it is time. learner_pid: the process that owns the replay."""
        now = self._clock()
        if now - self._measured_at < EVERY_S:
            return
        self._measured_at = now
        for name, space in [*measure(self._run_dir, learner_pid), *self._gpus.newest()]:
            watched = self.watched.setdefault(name, Watched(name, space))
            watched.measure(now, space)
            text = watched.warning(self._warn_hours)
            if text is not None:
                self._log.warning(text)
                self._events.warning(text)

    def close(self) -> None:
        """End the query of the GPUs."""
        self._gpus.close()


class GpuQuery:
    """Asks nvidia-smi for free memory, and takes its answer at the next call."""

    def __init__(self, gpus: Sequence[str], command: Sequence[str] = GPU_QUERY) -> None:
        self._gpus, self._command = list(gpus), command
        self._asked: subprocess.Popen[str] | None = None

    def newest(self) -> list[tuple[str, Space]]:
        """Return the answer to the previous query, if there is one, and ask again."""
        if not self._gpus:
            return []
        answer = self._answer()
        with suppress(OSError):
            self._asked = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        spaces = []
        for line in answer.splitlines():
            uuid, free, total = (part.strip() for part in line.split(","))
            if uuid in self._gpus and free.isdecimal() and total.isdecimal():
                spaces.append((f"GPU memory ({uuid})", Space(int(free) << 20, int(total) << 20)))
        return spaces

    def close(self) -> None:
        """End the query."""
        self._answer()

    def _answer(self) -> str:
        """Return what the query has printed, or nothing if it has not ended; it is ended then."""
        asked, self._asked = self._asked, None
        if asked is None:
            return ""
        if asked.poll() is None:
            asked.kill()
        return asked.communicate()[0] if asked.wait() == 0 else ""


def measure(run_dir: Path, learner_pid: int) -> list[tuple[str, Space]]:
    """Return what is free on the disk of the run folder and in memory. What cannot be measured is left out."""
    found = []
    with suppress(OSError):
        disk = os.statvfs(run_dir)
        found.append(("disk", Space(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)))
    memory = free_memory()
    if memory is not None:
        found.append(("memory", Space(max(0, memory.free - unfilled_bytes(learner_pid)), memory.total)))
    return found


def free_memory(
    meminfo: Path = Path("/proc/meminfo"),
    own_groups: Path = Path("/proc/self/cgroup"),
    groups: Path = Path("/sys/fs/cgroup"),
) -> Space | None:
    """Return the free memory of the machine, or of the tightest cgroup of this process; None if it is not known."""
    spaces = list(_group_spaces(own_groups, groups))
    with suppress(OSError, KeyError, ValueError):
        lines = (line.partition(":") for line in meminfo.read_text().splitlines())
        sizes = {name: 1024 * int(size.split()[0]) for name, _, size in lines if size.split()}
        spaces.append(Space(sizes["MemAvailable"], sizes["MemTotal"]))
    return min(spaces, key=lambda space: space.free, default=None)


def _group_spaces(own_groups: Path, groups: Path) -> Iterator[Space]:
    """Yield the space of every cgroup (version 2 or 1) of this process that limits memory."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        root, limit, used = groups, "memory.max", "memory.current"
        if number != "0":
            if "memory" not in controllers.split(","):
                continue
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # ValueError: the text "max", so this group has no limit
                total = int((place / limit).read_text())
                in_use = int((place / used).read_text()) - _reclaimable_bytes(place / "memory.stat")
                if total < 1 << 60:  # version 1 states a number close to 2**63 for no limit
                    yield Space(max(0, total - in_use), total)
            if place == root:
                break


def _reclaimable_bytes(stat: Path) -> int:
    """Return the size of files that the kernel would give up first."""
    with suppress(OSError):
        for line in stat.read_text().splitlines():
            name, _, size = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(size)
    return 0


def unfilled_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Return how much of a process's memory files (memfd) is not filled yet: the part of the replay without rows."""
    unfilled: dict[int, int] = {}  # by inode, because a file may be open twice
    with suppress(OSError):
        for link in (proc / str(pid) / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith("/memfd:"):
                    state = link.stat()
                    unfilled[state.st_ino] = max(0, state.st_size - 512 * state.st_blocks)
    return sum(unfilled.values())
