"""A process ends with its own exit code, although its simulator installed exit hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
SCRIPT = """
import atexit, os, sys
from collector_proc.simulators import ending
atexit.register(os._exit, 0)  # as Kit does: every exit code becomes 0
def main():
    ending.end_hard()
    sys.stdout.write("text")  # it is still in the buffer when the process ends
    {body}
ending.run(main)
"""


def code_of(body: str) -> int:
    """Return the exit code of a process whose stdout and stderr are a closed pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env["PYTHONPATH"] = str(REPO)
    try:
        command = [sys.executable, "-c", SCRIPT.format(body=body)]
        return subprocess.run(command, env=env, stdout=writer, stderr=writer, timeout=300, check=False).returncode
    finally:
        os.close(writer)


def test_a_broken_pipe_does_not_change_the_exit_code() -> None:
    assert code_of("return 5") == 5


def test_an_error_that_cannot_be_printed_still_ends_with_1() -> None:
    assert code_of("raise RuntimeError('not printed')") == 1
