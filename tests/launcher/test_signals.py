"""The signals of users and schedulers, sent to launch before, while and after the processes of a run start."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.processes import DEADLINE_S, wait_for_file

FAKES = Path(__file__).resolve().parents[1] / "fakes"
REPO = FAKES.parents[1]
QUICK = ["--config", "quickstart", "logger.backend=none", "optimization.total_optim_steps=100000"]


def start(folder: Path, learner: str, *settings: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start launch with fake children in the run folder `folder`/run."""
    command = [sys.executable, str(FAKES / "launch_with.py"), learner, "serve", *QUICK]
    env = os.environ | {"PYTHONPATH": f"{REPO}:{folder}", "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--run-dir", str(folder / "run"), *settings],
        env=env,
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and the output."""
    try:
        output = process.communicate(timeout=DEADLINE_S)[0]
    finally:
        process.kill()
    return process.returncode, output


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_during_the_checks_of_the_settings_leaves_nothing_behind(
    signum: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "slow_env.py").write_text(
        "import pathlib, time\npathlib.Path('imports').touch()\ntime.sleep(600)\ndef make(num_envs): ...\n"
    )
    process = start(
        tmp_path, "finish", "env.backend=torchrl", "env.name=slow_env:make", "env.task=", "env.frame_skip=1"
    )
    try:
        wait_for_file(tmp_path / "imports")
        process.send_signal(signal.SIGUSR2)  # there is nothing to save
        process.send_signal(signum)
    except BaseException:
        process.kill()
        raise
    code, output = end(process)
    assert code == 128 + signum, output
    assert f"interrupted by {signum.name} before anything was started" in output
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("tandem-*"))


def test_sigusr1_saves_and_ends_and_the_schedulers_sigterm_does_not_end_the_saving(tmp_path: Path) -> None:
    process = start(tmp_path, "save-late:may-save")
    for name in ("learner-serves", "collector-serves"):
        wait_for_file(tmp_path / "run" / name)
    process.send_signal(signal.SIGUSR1)
    wait_for_file(tmp_path / "run" / "learner-was-asked")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "run" / "may-save").touch()
    code, output = end(process)
    assert code == 138, output
    assert summary(tmp_path)["exit_reason"] == "interrupted by SIGUSR1"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "00000060"


def test_a_terminal_that_takes_no_output_blocks_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    outside, inside = pty.openpty()
    termios.tcflow(inside, termios.TCOOFF)  # as Ctrl-S does
    process = start(tmp_path, "save", stdout=inside)
    try:
        for name in ("learner-serves", "collector-serves"):
            wait_for_file(tmp_path / "run" / name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 143
    finally:
        process.kill()
        os.close(inside)
        os.close(outside)
    assert summary(tmp_path)["exit_reason"] == "interrupted by SIGTERM"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "00000060"


def test_sigusr2_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "serve")
    for name in ("learner-serves", "collector-serves"):
        wait_for_file(tmp_path / "run" / name)
    process.send_signal(signal.SIGUSR2)
    wait_for_file(tmp_path / "run" / "checkpoints" / "latest")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "00000050"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143
    assert summary(tmp_path)["learner_restarts"] == summary(tmp_path)["collector_restarts"] == 0


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_the_learner_compiles_ends_the_run_although_the_compiler_ignores_it(
    signum: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, "compile")
    wait_for_file(tmp_path / "run" / "learner-serves")
    process.send_signal(signal.SIGUSR2)  # it is kept until the learner trains
    process.send_signal(signum)
    code, output = end(process)
    assert code == 128 + signum, output
    assert summary(tmp_path)["exit_reason"] == f"interrupted by {signum.name} before training began"
