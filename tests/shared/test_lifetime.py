"""A process ends with its parent, gives way when memory is short, and notices every request to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.lifetime import StopFlag, StopRequested, install_stop_flag
from tests.processes import DEADLINE_S, is_alive, wait_for_file, wait_until_gone


def test_a_process_is_killed_when_its_parent_ends(tmp_path: Path) -> None:
    orphan = (
        "import os, pathlib, sys, time; from shared.lifetime import die_with_parent\n"
        "die_with_parent(); pathlib.Path(sys.argv[1] + '.new').write_text(str(os.getpid()))\n"
        "pathlib.Path(sys.argv[1] + '.new').rename(sys.argv[1]); time.sleep(600)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "env = os.environ | {'TANDEM_LAUNCH_PID': str(os.getpid())}\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], env=env, start_new_session=True); time.sleep(600)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent, orphan, str(tmp_path / "pid")])
    wait_for_file(tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    started.kill()
    started.wait(DEADLINE_S)
    wait_until_gone(pid)


def test_a_process_whose_parent_has_already_ended_does_not_start() -> None:
    script = "from shared.lifetime import die_with_parent; die_with_parent(); raise RuntimeError('it went on')"
    env = os.environ | {"TANDEM_LAUNCH_PID": "1"}
    answer = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert answer.returncode == 1 and "it went on" not in answer.stderr
    assert "the parent process (pid 1) ended before" in answer.stderr


def test_a_process_that_names_its_parent_is_not_bound_to_launch() -> None:
    script = (
        "import os, sys; from shared.lifetime import die_with_parent; die_with_parent(int(sys.argv[1])); print('on')"
    )
    command, env = [sys.executable, "-c", script], os.environ | {"TANDEM_LAUNCH_PID": "1"}
    for parent, output in ((os.getpid(), "on\n"), (1, "")):
        answer = subprocess.run(
            [*command, str(parent)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=300
        )
        assert answer.stdout == output


def test_the_out_of_memory_score_is_raised_and_never_lowered() -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    script = (
        "import pathlib, sys; from shared.lifetime import die_first_when_memory_ends\n"
        "score = pathlib.Path('/proc/self/oom_score_adj')\n"
        "for before in (None, '700'):\n"
        "    before and score.write_text(before); die_first_when_memory_ends(); print(int(score.read_text()))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert answer.stdout.split() == [str(max(own, 500)), "700"]


def test_a_stop_flag_can_take_the_signals_back_from_a_simulator() -> None:
    before = signal.getsignal(signal.SIGINT)  # SIG_IGN if a shell started pytest in the background
    flag: StopFlag = install_stop_flag()
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some simulators do this
        os.kill(os.getpid(), signal.SIGTERM)
        assert not flag.requested
        flag.install()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (flag.requested, flag.signum, flag.count) == (True, signal.SIGTERM, 2)
    finally:
        flag.restore()
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_first_signal_interrupts_code_that_does_not_look_at_the_flag() -> None:
    flag, steps = install_stop_flag(), []
    try:
        with pytest.raises(StopRequested), flag.interrupting():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("the code continues")
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                steps.append("the cleanup is complete")
        os.kill(os.getpid(), signal.SIGTERM)
        assert steps == ["the cleanup is complete"] and flag.count == 3
        with pytest.raises(StopRequested), flag.interrupting():
            steps.append("the code begins after a request to stop")
        assert len(steps) == 1
    finally:
        flag.restore()
