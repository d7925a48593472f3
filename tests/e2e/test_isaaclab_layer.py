"""4096 ANYmal-C robots through both processes, with Isaac Lab's real Python layer and the real task configuration.

The physics is a toy that runs on the CPU (tier B). Isaac Sim is not used, and times measured here mean nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learner_proc.startup import open_run
from tests.fakes.isaac_tiers import environment, wheel_sources

REPO = Path(__file__).parents[2]
LAUNCH = """
import sys, launch
from launcher.children import COMMANDS
collector = (sys.executable, "tests/e2e/truthful_collector.py")
sys.exit(launch.main(sys.argv[1:], commands={**COMMANDS, "collector": collector}))
"""
CHUNKS, TICKS, ENVS = 20, 5, 4096
SMALL = [
    "--config", "isaaclab", f"collector.frames_per_batch={TICKS * ENVS}",
    f"collector.init_random_frames={2 * TICKS * ENVS}",
    "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    f"replay_buffer.buffer_size={40 * TICKS * ENVS}", "replay_buffer.batch_size=640", "replay_buffer.batch_length=8",
    "optimization.imagination_starts=null",
    "replay_buffer.checksum=true", "optimization.log_every=4", "optimization.autocast=false",
    "optimization.compile.enabled=false",
    # Step 32 (of 640 frames) may run once 20 chunks (of 20,480 frames) are collected: 31 * 640 = 0.05 * 396,800.
    "optimization.replay_ratio=0.05", "optimization.total_optim_steps=32",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not wheel_sources(), reason="isaaclab 2.3.2.post1 is not installed")
def test_all_rows_of_4096_robots_reach_the_learner_unchanged(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", LAUNCH, "--run-dir", str(run_dir), *SMALL]
    done = subprocess.run(command, cwd=REPO, env=environment("B"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["gradient_steps"] == 32 and summary["collector_restarts"] == 0 and summary["nan_skips"] == 0
    assert summary["agent_steps"] == summary["env_frames"] >= (CHUNKS - 1) * TICKS * ENVS

    truth = torch.load(run_dir / "truth.pt", weights_only=False)
    replay = open_run(run_dir)[2]
    num_rows = replay.num_rows
    assert num_rows >= (CHUNKS - 1) * TICKS
    ring = {name: replay.views[name][:num_rows] for name in ("reward", "is_first", "is_last", "is_terminal")}
    policy = replay.views["obs", "policy"][:num_rows]
    kept = truth["rows"]["reward"].shape[1]
    # The learner's rows equal what the collector observed, bit by bit: no later step has changed them.
    for name in ring:
        assert torch.equal(ring[name][:, :kept], truth["rows"][name][:num_rows]), name
    assert torch.equal(policy[:, :kept], truth["rows"]["policy"][:num_rows])
    assert policy.isfinite().all()
    assert ring["is_first"][0].all() and torch.equal(ring["is_first"][1:], ring["is_last"][:-1])
    _check_terminal_rows(policy, ring["is_last"], truth["resets"])
    assert ring["is_terminal"].any() and (ring["is_last"] & ~ring["is_terminal"]).any()


def _check_terminal_rows(policy: torch.Tensor, last: torch.Tensor, resets: list) -> None:
    """Check that the last row of every episode has the joint angles and speeds from before the reset.

    The task adds noise of at most 0.01 to angles and 1.5 to speeds.
    """
    default_angles = torch.tensor([0.0] * 4 + [0.4, -0.4] * 2 + [-0.8, 0.8] * 2)
    ended = torch.zeros_like(last)
    for tick, envs, state in resets:
        if not 0 < tick < len(last):
            continue
        ended[tick, envs] = True
        row = policy[tick, envs]
        assert ((row[:, 12:24] - (state[:, :12] - default_angles)).abs() <= 0.01 + 1e-5).all(), tick
        assert ((row[:, 24:36] - state[:, 12:]).abs() <= 1.5 + 1e-4).all(), tick
    assert torch.equal(ended, last) and ended.sum() > ENVS
