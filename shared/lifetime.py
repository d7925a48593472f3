"""How a process begins and ends: exit codes, signals, stack dumps, and death together with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import IO, Any


class ExitCode(IntEnum):
    """How a process of a run ends. 128 + N means that signal N ended it."""

    FINISHED = 0  # the collector: it was asked to stop, or the learner is gone
    FAILED = 1  # anything that has no code of its own
    REFUSED = 2  # a setting, a checkpoint or a simulator cannot work; another start would end alike
    OUTGROWN = 75  # a collector held more memory than collector.max_rss_gb; the next one may start


LAUNCH_PID = "TANDEM_LAUNCH_PID"
SIM_GPU_INDEX = "TANDEM_SIM_GPU_INDEX"  # set by launch: the simulator's GPU as nvidia-smi counts
OOM_SCORE = 500  # of a process that can be replaced; 0 is usual, 1000 the most
# Open for the life of the process: faulthandler writes to the descriptor from inside a signal handler.
_dump_files: list[IO[str]] = []


def die_with_parent() -> None:
    """Tie this process's life to launch's: SIGKILL as soon as its parent ends, SystemExit if it already has.

    Run by hand, without launch, the parent is the shell.
    """
    pr_set_pdeathsig = 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed; wanted Linux 2.1.57 or newer")
    expected = os.environ.get(LAUNCH_PID)
    if expected is not None and os.getppid() != int(expected):
        raise SystemExit(f"launch (pid {expected}) ended before this process started; start launch.py again")


def die_first_when_memory_ends() -> None:
    """Let the kernel, short of memory, kill this process and its children before others; as far as it permits."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(max(OOM_SCORE, int(score.read_text()))))


class StopFlag:
    """Set once SIGTERM, SIGINT or SIGHUP arrives; loops poll `requested` and end in good order."""

    def __init__(self) -> None:
        self.requested = False
        self.signum: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP (a closed terminal), again if a simulator has taken them meanwhile."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            before = signal.signal(signum, self._set)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.signum = self.signum or signum
        self.count += 1


def install_stop_flag() -> StopFlag:
    flag = StopFlag()
    flag.install()
    return flag


def enable_stack_dumps(crash_dir: Path, process: str) -> Path:
    """Where SIGUSR1 (and a fatal signal) writes every thread's stack: `crash/<process>.stacks`."""
    path = crash_dir / f"{process}.stacks"
    file = path.open("a")
    faulthandler.enable(file=file, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    _dump_files.append(file)
    return path


def renew_stack_dumps() -> None:
    """Take the fatal signals back from a simulator that has caught them: they dump the stacks and end the process."""
    faulthandler.disable()
    faulthandler.enable(file=_dump_files[-1] if _dump_files else 2, all_threads=True)
