"""Write to stdout and stderr so that training never depends on a terminal, a pipe or a disk that takes the text."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

BLOCKED_S = 3.0  # after this, a terminal that was stopped or a pipe that no process reads gets no more output of a run
STDOUT, STDERR = 1, 2


@contextmanager
def lost_output_ignored(stream: IO[str] | None, *, limit_s: float | None = None) -> Iterator[None]:
    """Ignore an error of writing to a stream in this block. `stream` gets no text any more after such an error.

    The terminal was closed (EIO), the program that read our output has ended (EPIPE, for which rich raises SystemExit),
    the disk is full, or the stream was closed before this process started. A character that the stream cannot encode
    loses one text only.
    limit_s: it is also an error if a terminal or a pipe takes no output for so long. None: wait for it.
    """
    try:
        with _interrupted_after(limit_s if _may_block(stream) else None):
            yield
    except UnicodeError:
        return
    except (OSError, ValueError, SystemExit):
        if stream is not None:
            _discard(stream)


def write_error(text: str) -> None:
    """Write a text to stderr if that is possible within BLOCKED_S."""
    _write(sys.stderr, text, limit_s=BLOCKED_S)


def write_output(text: str) -> None:
    """Write a text to stdout if that is possible. It waits for a reader that pauses, such as `less`."""
    _write(sys.stdout, text, limit_s=None)


@contextmanager
def output_aside() -> Iterator[None]:
    """Send to stderr what this block prints, also from C code, so that stdout holds the result of a command only."""
    stdout = sys.stdout
    with suppress(OSError, ValueError, AttributeError):
        stdout.flush()
    try:
        kept = os.dup(STDOUT)
        os.dup2(STDERR, STDOUT)
    except OSError:  # one of them is closed
        kept = None
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
        if kept is not None:
            os.dup2(kept, STDOUT)
            os.close(kept)


def _write(stream: IO[str] | None, text: str, *, limit_s: float | None) -> None:
    if stream is None:  # Python sets it to None if the process was started with a closed stream
        return
    with lost_output_ignored(stream, limit_s=limit_s):
        stream.write(text)
        stream.flush()


def _may_block(stream: IO[str] | None) -> bool:
    """Return whether a stream is a terminal, a pipe or a socket, whose other end may take no output."""
    try:
        return stream is not None and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):  # a stream of a test has no descriptor
        return False


@contextmanager
def _interrupted_after(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, also in a system call. Only the main thread can."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _time_out)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def _time_out(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError("the output was not taken")


def _discard(stream: IO[str]) -> None:
    """Send what is written to a stream from now on to /dev/null, and what is still in its buffer too.

    Otherwise Python would try to write the buffer when the process ends, and change its exit code to 120.
    """
    with suppress(OSError, ValueError, AttributeError):  # a stream of a test has no descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
