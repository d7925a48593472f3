"""Laws of the end of a process whose simulator brought exit hooks of its own."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import atexit, os, sys
from collector_proc.simulators import ending
atexit.register(os._exit, 0)  # as Kit's: whatever happened becomes 0
def main():
    ending.end_hard()
    sys.stdout.write("last words")  # still in the buffer
    {body}
ending.run(main)
"""


def code_of(body: str) -> int:
    """The exit code of a process whose stdout and stderr nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        command = [sys.executable, "-c", SCRIPT.format(body=body)]
        return subprocess.run(command, env=env, stdout=writer, stderr=writer, timeout=60, check=False).returncode
    finally:
        os.close(writer)


def test_a_broken_pipe_does_not_hand_the_process_to_exit_hooks() -> None:
    assert code_of("return 5") == 5


def test_an_error_that_cannot_be_written_down_still_ends_with_1() -> None:
    assert code_of("raise RuntimeError('unheard')") == 1
