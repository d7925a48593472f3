"""Text for the user is lost, and nothing else happens, if stdout or stderr cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.output import write_error

REPO = Path(__file__).parents[2]
# Writes until the reader has gone, and then ends with its own exit code.
SCRIPT = """
import sys
from shared.output import lost_output_ignored, write_error
for _ in range(100_000):
    with lost_output_ignored(sys.stdout):
        print("x" * 100, flush=True)
    write_error("y" * 100)
sys.exit(7)
"""


@pytest.mark.parametrize("redirection", ["> /dev/full 2> /dev/full", ">&- 2>&-", "2>&1 | head -c 10"])
def test_a_process_whose_output_is_lost_ends_with_its_own_exit_code(redirection: str) -> None:
    command = f"set -o pipefail; {sys.executable} -c '{SCRIPT}' {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=REPO, env=os.environ, capture_output=True, timeout=300)
    assert done.returncode == 7, done.stderr


def test_an_error_is_written_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    write_error("error: x\n")
    assert capsys.readouterr().err == "error: x\n"
