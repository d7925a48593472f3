"""Whole runs through launch.py with the torchrl and the mjlab backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TINY = [
    "networks.state_dim=4",
    "networks.rssm_hidden_dim=16",
    "networks.hidden_dim=16",
    "replay_buffer.batch_size=64",
    "replay_buffer.batch_length=8",
    "optimization.log_every=5",
    "optimization.total_optim_steps=40",
    "optimization.replay_ratio=4",
    "env.horizon=10",
    "collector.frames_per_batch=40",
    "logger.backend=none",
]
SHORT = {
    "gym": ["env.num_envs=4", "collector.eval_envs=1", "collector.init_random_frames=80"],
    "mjlab_cartpole": ["env.num_envs=8", "collector.eval_envs=2", "collector.init_random_frames=160"],
}


@pytest.mark.parametrize("config", SHORT)
def test_a_run_trains_and_reports_evaluation_returns(config: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(REPO / "launch.py"), "--config", config, "--run-dir", str(run_dir)]
    environ = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    ended = subprocess.run(
        [*command, *SHORT[config], *TINY],
        cwd=REPO,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["gradient_steps"] == 40
    assert last["num_diverged"] == 0
    assert last["eval_return_mean"] is not None, "an episode of 10 steps ends in the evaluation environments"
    assert last["episode_return_mean"] is not None
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["collector_restarts"] == 0
