"""How a process starts and ends: exit codes, signals, stack dumps, and ending together with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import IO, Any


class ExitCode(IntEnum):
    """The exit codes of launch, the collector and the learner. 128 + N means that signal N ended the process."""

    FINISHED = 0  # the run is complete; for the collector: it was asked to stop, or the learner has ended
    FAILED = 1  # any failure that has no code of its own
    REFUSED = 2  # a setting, a checkpoint or a simulator cannot work, so another start would end in the same way
    OUTGROWN = 75  # a collector exceeded collector.max_rss_gb; launch starts the next one
    RECYCLED = 76  # a collector reached collector.recycle_after_hours; launch starts the next one


# Environment variables that launch sets for its processes.
LAUNCH_PID = "TANDEM_LAUNCH_PID"
SIM_GPU_INDEX = "TANDEM_SIM_GPU_INDEX"  # the index of the simulator's GPU in the order of nvidia-smi
OOM_SCORE = 500  # the out-of-memory score of a process that can be restarted; 0 is usual and 1000 the highest
_PR_SET_PDEATHSIG = 1
# Files that stay open until the process ends, because faulthandler writes to their descriptors in a signal handler.
_dump_files: list[IO[str]] = []


def die_with_parent(parent_pid: int | None = None) -> None:
    """Let the kernel kill this process (SIGKILL) as soon as its parent ends.

    `parent_pid` is the process that started this one. By default it is launch, whose pid is in the environment variable
    TANDEM_LAUNCH_PID. A process that was started without launch, for example from a shell, skips the check below.

    Raises: SystemExit if that parent has already ended; OSError if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed; expected Linux; run on a Linux machine")
    if parent_pid is None and LAUNCH_PID in os.environ:
        parent_pid = int(os.environ[LAUNCH_PID])
    # A parent that ended before the call above has left no signal behind, so compare the pids.
    if parent_pid is not None and os.getppid() != parent_pid:
        raise SystemExit(
            f"the parent process (pid {parent_pid}) ended before this process started; expected it to run; "
            "start launch.py again"
        )


def die_first_when_memory_ends() -> None:
    """Make this process and its children the first to be killed if the machine runs out of memory.

    Nothing happens where the kernel does not permit it. A score that is higher already stays.
    """
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(max(OOM_SCORE, int(score.read_text()))))


class StopRequested(Exception):
    """The process was asked to stop while it waited."""


class StopFlag:
    """Remember that SIGTERM, SIGINT or SIGHUP arrived. Loops poll `requested` and then end in an orderly way.

    further: other signals with the same meaning. count: how many of them were SIGINT or SIGTERM. Only these show
    impatience: a scheduler sends SIGUSR1 first, and a session that closes sends SIGHUP together with SIGTERM.
    """

    def __init__(self, *further: int) -> None:
        self._signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *further)
        self.requested = False
        self.signum: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}
        self._interrupts = False

    def install(self) -> None:
        """Handle the signals; SIGHUP: a closed terminal. Call it again if a simulator replaced the handlers."""
        for signum in self._signals:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # the user started the run with nohup, so it must continue without its terminal
            before = signal.signal(signum, self._set)
            self._before.setdefault(signum, before)

    def check(self) -> None:
        """Raise StopRequested if one of the signals has arrived."""
        if self.requested:
            raise StopRequested

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise StopRequested at once in the code inside, because that code does not look at the flag.

        Only the first signal does so, so that others do not disturb the cleanup. Raises: StopRequested.
        """
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False

    def restore(self) -> None:
        """Install the handlers again that were there before the first `install`."""
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.signum = self.signum or signum
        self.count += signum in (signal.SIGINT, signal.SIGTERM)
        if self._interrupts:
            self._interrupts = False
            raise StopRequested


def install_stop_flag(*further: int) -> StopFlag:
    """Return a new stop flag that already handles the signals, and `further` ones."""
    flag = StopFlag(*further)
    flag.install()
    return flag


class SaveFlag:
    """Remember that SIGUSR2 arrived, which asks the learner to save and to go on."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def install(self) -> None:
        """Handle SIGUSR2, also one that has waited since this process was started (`held_signals`)."""
        self._before = signal.signal(signal.SIGUSR2, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])

    def take(self) -> bool:
        """Return whether SIGUSR2 has arrived since the last call."""
        requested, self._requested = self._requested, False
        return requested

    def restore(self) -> None:
        """Install the handler again that was there before."""
        signal.signal(signal.SIGUSR2, self._before)

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self._requested = True


# A process of a run starts with these blocked, because their default action would end it before it has handlers.
HELD_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Let a process that is started inside begin with HELD_SIGNALS blocked. Ours wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def enable_stack_dumps(crash_dir: Path, process: str) -> Path:
    """Write the stack of every thread to `crash/<process>.stacks` on SIGUSR1 and on fatal signals; return that path."""
    path = crash_dir / f"{process}.stacks"
    file = path.open("a")
    faulthandler.enable(file=file, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # launch starts its processes with it blocked
    _dump_files.append(file)
    return path


def renew_stack_dumps() -> None:
    """Handle fatal signals again (dump the stacks, then end) after a simulator replaced the handlers."""
    faulthandler.disable()
    faulthandler.enable(file=_dump_files[-1] if _dump_files else 2, all_threads=True)
