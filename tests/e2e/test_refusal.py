"""A collector that refuses a setting: while it runs, the run ends and is saved; while it restarts, it is started again.

The same error while a simulator is built again may go away, for example because a user is editing a module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
LAUNCH = """
import sys, launch
from launcher.children import COMMANDS
collector = (sys.executable, "tests/e2e/refusing_collector.py")
sys.exit(launch.main(sys.argv[1:], commands={**COMMANDS, "collector": collector}))
"""
TINY = [
    "--config", "quickstart", "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    "replay_buffer.batch_size=64", "replay_buffer.batch_length=8", "optimization.log_every=10", "logger.backend=none",
    "optimization.compile.enabled=false", "optimization.replay_ratio=2",
]  # fmt: skip


def test_a_refusal_during_a_restart_is_tried_again_and_one_during_the_run_ends_it_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", LAUNCH, "--run-dir", str(run), *TINY]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "is too low for the images; set it higher" in output, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["collector_restarts"] == 2  # one after the death, one after the refusal during the restart
    assert "is too low for the images" in summary["exit_reason"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: "), "the last line names the fix"
    assert int((run / "checkpoints" / "latest").read_text()) >= 30
