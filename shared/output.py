"""Write to stdout and stderr so that training never depends on a terminal, a pipe or a disk that takes the text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

STDOUT, STDERR = 1, 2


@contextmanager
def lost_output_ignored(stream: IO[str] | None) -> Iterator[None]:
    """Ignore an error of writing to a stream in this block. `stream` gets no text any more after such an error.

    The terminal was closed (EIO), the program that read our output has ended (EPIPE, for which rich raises SystemExit),
    the disk is full, or the stream was closed before this process started. A character that the stream cannot encode
    loses one text only.
    """
    try:
        yield
    except UnicodeError:
        return
    except (OSError, ValueError, SystemExit):
        if stream is not None:
            _discard(stream)


def write_error(text: str) -> None:
    """Write a text to stderr if that is possible."""
    _write(sys.stderr, text)


def write_output(text: str) -> None:
    """Write a text to stdout if that is possible."""
    _write(sys.stdout, text)


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


def _write(stream: IO[str] | None, text: str) -> None:
    if stream is None:  # Python sets it to None if the process was started with a closed stream
        return
    with lost_output_ignored(stream):
        stream.write(text)
        stream.flush()


def _discard(stream: IO[str]) -> None:
    """Send what is written to a stream from now on to /dev/null, and what is still in its buffer too.

    Otherwise Python would try to write the buffer when the process ends, and change its exit code to 120.
    """
    with suppress(OSError, ValueError, AttributeError):  # a stream of a test has no descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
