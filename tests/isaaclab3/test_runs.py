"""Whole runs through launch.py on the real Isaac Lab 3: a collector that is killed, and a run that is asked to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.checkpoints import newest_verified
from shared.progress import read
from tests.fakes.isaac_tiers import DEADLINE_S, REPO
from tests.processes import is_alive, wait_until_gone

pytestmark = pytest.mark.isaaclab3
STEPS = 60
SMALL = [
    "--config", "isaaclab_cartpole", "env.num_envs=16", "env.horizon=20",
    "collector.eval_envs=2", "collector.frames_per_batch=160", "collector.init_random_frames=320",
    "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    "replay_buffer.buffer_size=32000", "replay_buffer.batch_size=64", "replay_buffer.batch_length=8",
    "optimization.log_every=5",
    # Each gradient step needs 128 new frames. So the learner cannot finish without the second collector.
    "optimization.replay_ratio=0.5",
]  # fmt: skip


def start(run_dir: Path, env: dict[str, str], *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "launch.py"), "--run-dir", str(run_dir), *SMALL, *overrides]
    return subprocess.Popen(
        command, cwd=run_dir.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(launch: subprocess.Popen[str]) -> str:
    try:
        return launch.communicate(timeout=DEADLINE_S)[0]
    except subprocess.TimeoutExpired:
        launch.send_signal(signal.SIGTERM)
        launch.send_signal(signal.SIGTERM)
        raise


def wait_for_steps(run_dir: Path, steps: int, launch: subprocess.Popen[str]) -> None:
    """Return once the learner has made so many gradient steps. Fails after DEADLINE_S, or if launch has ended."""
    end = time.monotonic() + DEADLINE_S
    while launch.poll() is None and time.monotonic() < end:
        progress = run_dir / "learner.progress"
        if progress.exists() and read(progress).status.get("gradient_steps", 0) >= steps:
            return
        time.sleep(0.02)
    pytest.fail(f"there are no {steps} gradient steps; launch wrote:\n{finish(launch)}")


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_a_collector_that_is_killed_is_replaced_and_the_run_finishes(tmp_path: Path, isaac_env: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    launch = start(run_dir, isaac_env, f"optimization.total_optim_steps={STEPS}")
    wait_for_steps(run_dir, 5, launch)
    collector = read(run_dir / "collector.progress").pid
    os.kill(collector, signal.SIGKILL)
    output = finish(launch)
    assert launch.returncode == 0, output
    result = summary(run_dir)
    assert (result["exit_reason"], result["gradient_steps"]) == ("finished", STEPS)
    assert result["collector_restarts"] == 1 and result["learner_restarts"] == 0 and result["nan_skips"] == 0
    assert result["env_frames"] == result["agent_steps"] >= STEPS * 128 - 320 and result["episodes"] > 16
    assert not is_alive(collector) and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_gets_sigterm_while_it_steps_ends_with_143_and_a_checkpoint(
    tmp_path: Path, isaac_env: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    launch = start(run_dir, isaac_env, "optimization.total_optim_steps=1000000")
    wait_for_steps(run_dir, 5, launch)
    processes = [read(run_dir / f"{role}.progress").pid for role in ("collector", "learner")]
    launch.send_signal(signal.SIGTERM)
    output = finish(launch)
    assert launch.returncode == 128 + signal.SIGTERM, output
    assert summary(run_dir)["exit_reason"] == "interrupted by SIGTERM"
    checkpoint = newest_verified(run_dir / "checkpoints")
    assert checkpoint is not None and checkpoint.manifest.step == summary(run_dir)["gradient_steps"] >= 5
    for pid in processes:
        wait_until_gone(pid)
