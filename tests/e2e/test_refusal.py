"""A setting that shows as wrong in mid-run ends it at once, with what was trained until then saved; one that shows while a
simulator that has run is built anew does not.
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


def test_a_setting_refused_in_mid_run_ends_it_saved_and_one_refused_by_a_restart_is_tried_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", LAUNCH, "--run-dir", str(run), *TINY]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "does not hold the images any more: set it higher" in output, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["collector_restarts"] == 2  # after a death and after a refusal in building
    assert "does not hold the images any more" in summary["exit_reason"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: "), "what to mend stands last"
    assert int((run / "checkpoints" / "latest").read_text()) >= 30
