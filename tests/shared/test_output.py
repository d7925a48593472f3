"""Text for the user is lost, and nothing else happens, if stdout or stderr cannot be written to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.output import lost_output_ignored, write_error

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


def test_what_is_printed_aside_goes_to_stderr_also_from_c(tmp_path: Path) -> None:
    script = (
        "import ctypes, os\n"
        "from shared.output import output_aside, write_output\n"
        "libc = ctypes.CDLL(None)\n"
        "write_output('before\\n')\n"
        "with output_aside():\n"
        "    print('python', flush=True)\n"
        "    libc.puts(b'C'); libc.fflush(None)\n"
        "    os.system('echo child')\n"
        "write_output('after\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "python\nC\nchild\n")


def test_a_closed_stream_does_not_prevent_the_work_aside() -> None:
    script = "from shared.output import output_aside\nwith output_aside():\n    open('/dev/null').close()\n"
    for redirection in (">&-", "2>&-", ">&- 2>&-"):
        command = f'exec "$0" -c "$1" {redirection}'
        done = subprocess.run(["bash", "-c", command, sys.executable, script], cwd=REPO, timeout=60)
        assert done.returncode == 0, redirection


def test_a_pipe_that_no_process_reads_stops_the_output_and_not_the_process() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(65536))
    os.set_blocking(writing, True)
    before = signal.getsignal(signal.SIGALRM)
    with os.fdopen(writing, "w") as stream:
        with lost_output_ignored(stream, limit_s=0.1):
            stream.write("text")
            stream.flush()
        with lost_output_ignored(stream, limit_s=0.1):
            stream.write("more")
            stream.flush()
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    os.close(reading)
