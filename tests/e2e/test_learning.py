"""A whole training run that must learn: a shortened quickstart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_quickstart_learns_to_swing_up(tmp_path, seed):
    run_dir = tmp_path / "run"
    command = [sys.executable, "launch.py", "--config", "quickstart", "--run-dir", str(run_dir), f"env.seed={seed}"]
    subprocess.run([*command, "optimization.total_optim_steps=2000"], cwd=REPO, check=True, timeout=900)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["evaluation_mean"] or 0.0 for row in rows) > 170, "of at most 200; random actions reach about 64"
    assert rows[-1]["open_loop_policy_5"] < 0.5 * rows[-1]["repeat_last_policy_5"], (
        "the model predicts better than a repetition of the last observation"
    )
