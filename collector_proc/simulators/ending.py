"""The end of a process whose simulator may not let it end: a deadline for closing, and an exit past every exit hook."""

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
GIL_S = 5.0  # how much later the watchdog that needs no interpreter comes
_state = {"hard": False}


def end_hard() -> None:
    """From now on `run` ends the process at once: a simulator brings exit hooks that hang or turn every code into 0."""
    _state["hard"] = True


def run(main: Callable[[], int]) -> NoReturn:
    """Run main and end the process with its code, or with 1 if it did not come as far as to return one."""
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
        sys.exit(code)
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                # a full disk, a closed pipe: the code matters more than the last words
                stream.flush()
    finally:
        os._exit(code)


@contextmanager
def closing_deadline(seconds: float, code: int) -> Iterator[None]:
    """What runs inside ends within `seconds`, or the process does: with all stacks on stderr and `code`.

    Where something holds the interpreter itself, the process ends 5 s later with code 1.
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
