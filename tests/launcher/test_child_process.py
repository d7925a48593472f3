"""A child process is asked to end, then killed, always together with the processes that it started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launcher.child_process import ChildProcess
from tests.processes import DEADLINE_S, is_alive, wait_for_file, wait_until_gone


def _child(tmp_path: Path, script: str, *args: str) -> ChildProcess:
    return ChildProcess(
        "child",
        [sys.executable, "-c", script, *args],
        output=tmp_path / "child.out",
        env=dict(os.environ),
        cwd=Path.cwd(),
    )


def test_a_child_that_ignores_sigterm_is_killed_after_its_deadline(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[2]).touch())\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while True: time.sleep(1)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "up"), str(tmp_path / "asked"))
    wait_for_file(tmp_path / "up")
    began = time.monotonic()
    assert child.stop(0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - began < DEADLINE_S
    assert (tmp_path / "asked").exists(), "SIGTERM comes before SIGKILL"


def test_a_child_that_handles_sigterm_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from shared.lifetime import install_stop_flag\n"
        "flag = install_stop_flag(); pathlib.Path(sys.argv[1]).touch()\n"
        "while not flag.requested: time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "up"))
    wait_for_file(tmp_path / "up")
    assert child.stop(DEADLINE_S) == 7


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_the_childs_own_children_end_with_it(how: str, tmp_path: Path) -> None:
    script = (
        "import pathlib, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[1] + '.new').write_text(str(worker.pid))\n"
        "pathlib.Path(sys.argv[1] + '.new').rename(sys.argv[1])\n"
        "time.sleep(600 if sys.argv[2] == 'kill' else 0)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "worker"), how)
    wait_for_file(tmp_path / "worker")
    worker = int((tmp_path / "worker").read_text())
    if how == "kill":
        assert is_alive(worker)
        child.kill()
    else:
        assert child.wait(DEADLINE_S) == 0
    wait_until_gone(worker)


def test_stop_gives_up_before_its_deadline_if_asked_to(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1]).touch()\nwhile True: time.sleep(1)\n"
    )
    child = _child(tmp_path, script, str(tmp_path / "ignores"))
    wait_for_file(tmp_path / "ignores")
    began = time.monotonic()
    assert child.stop(20.0, give_up=lambda: time.monotonic() > began + 0.1) == -signal.SIGKILL
    assert time.monotonic() - began < 20.0


def test_the_last_lines_of_a_childs_output_are_kept(tmp_path: Path) -> None:
    child = _child(tmp_path, "for n in range(100): print(n)")
    assert child.wait(DEADLINE_S) == 0
    assert child.last_output(3) == ["97", "98", "99"]


def test_a_stack_dump_names_the_function_that_a_child_is_in(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from shared.lifetime import enable_stack_dumps\n"
        "enable_stack_dumps(pathlib.Path(sys.argv[1]), 'learner')\n"
        "def stuck_in_here():\n    pathlib.Path(sys.argv[2]).touch(); time.sleep(600)\n"
        "stuck_in_here()\n"
    )
    child = _child(tmp_path, script, str(tmp_path), str(tmp_path / "up"))
    wait_for_file(tmp_path / "up")
    child.dump_stacks()
    child.kill()
    assert "stuck_in_here" in (tmp_path / "learner.stacks").read_text()
