"""Wait for what the processes that a test started do, with a deadline."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time
from collections.abc import Callable, Sequence
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


def exit_code_after_its_terminal_closes(
    command: Sequence[str], *, is_ready: Callable[[], bool], seconds: float, **environment: str
) -> int:
    """Run a command in a terminal, close the terminal once the command is ready, and return the exit code.

    Raises: AssertionError if the command is not ready, or has not ended, after so many seconds.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
        os.execvpe(command[0], list(command), {**os.environ, **environment})
    os.set_blocking(terminal, False)
    end = time.monotonic() + seconds
    while not is_ready():
        assert time.monotonic() < end, f"{command} is not ready after {seconds:g} s"
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
        time.sleep(0.05)
    os.close(terminal)  # the kernel sends SIGHUP, and each write to the terminal fails
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < end, f"{command} has not ended after {seconds:g} s"
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])
