"""End a process although its simulator may prevent it: a deadline for closing, and an exit that skips exit hooks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

STDERR = 2
# The second watchdog acts this much later than the first. It works even if a C function holds the interpreter's lock.
GIL_S = 5.0
_state = {"hard": False}


def end_hard() -> None:
    """Let `run` end the process without exit hooks, because a simulator's hooks may hang or change the exit code."""
    _state["hard"] = True


def run(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with the exit code that it returns, or with 1 if it raises an exception."""
    sys.exit(guarded(main))


def guarded(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code. If `end_hard` was called meanwhile, end the process instead."""
    try:
        code = main()
    except SystemExit as asked:
        if not _state["hard"]:
            raise
        code = asked.code if isinstance(asked.code, int) and asked.code else 1
    except BaseException:
        if not _state["hard"]:
            raise
        with contextlib.suppress(Exception):
            traceback.print_exc()
        code = 1
    if not _state["hard"]:
        return code
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()  # a full disk or a closed pipe must not change the exit code
    finally:
        os._exit(code)


@contextmanager
def closing_deadline(seconds: float, code: int) -> Iterator[None]:
    """End the process if the code inside takes more than `seconds`: print all stacks on stderr and exit with `code`.

    If a C function holds the interpreter's lock, the process ends 5 s later, with exit code 1.
    """
    timer = threading.Timer(seconds, _give_up, (seconds, code))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GIL_S, exit=True, file=STDERR)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(seconds: float, code: int) -> None:
    os.write(STDERR, f"closing the simulator took more than {seconds:g} s; ending with code {code}\n".encode())
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os._exit(code)
