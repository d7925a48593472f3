"""A collector whose simulator leaks memory is replaced, and the learner continues.

A run ends if every collector exceeds its limit soon after its start, or if no collector can stay below the limit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
LAUNCH = """
import sys, launch
from launcher.children import COMMANDS
collector = (sys.executable, "tests/e2e/leaking_collector.py", sys.argv.pop(1))
sys.exit(launch.main(sys.argv[1:], commands={**COMMANDS, "collector": collector}))
"""
TINY = [
    "--config", "quickstart", "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    "replay_buffer.batch_size=64", "replay_buffer.batch_length=8", "optimization.log_every=10", "logger.backend=none",
    "optimization.replay_ratio=2", "optimization.total_optim_steps=300", "collector.max_restarts=0",
]  # fmt: skip


def run(run_dir: Path, *settings: str, num_leaking: int = 1) -> tuple[int, str]:
    command = [sys.executable, "-c", LAUNCH, str(num_leaking), "--run-dir", str(run_dir), *TINY, *settings]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def events(run_dir: Path, process: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logs" / f"{process}.jsonl").read_text().splitlines()]


def test_a_collector_that_uses_too_much_memory_is_replaced_while_the_learner_continues(tmp_path: Path) -> None:
    code, output = run(tmp_path / "run", "collector.max_rss_gb=1.0", "collector.healthy_after_s=0.5")
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["gradient_steps"] == 300 and all(row["learner_rss_gb"] > 0.05 for row in rows)
    seen = [row["collector_rss_gb"] for row in rows]
    assert max(seen) > seen[-1] + 0.2, "the memory grew, and is small again in the new collector"
    started = [event["role"] for event in events(tmp_path / "run", "launch") if event["event"] == "started"]
    assert started == ["learner", "collector", "collector"], output
    ended = [event for event in events(tmp_path / "run", "collector") if event["event"] == "ended"]
    assert [event["exceeded_memory_limit"] for event in ended] == [True, False]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["collector_restarts"] == 1 and summary["exit_reason"] == "finished"


def test_a_run_ends_if_every_collector_soon_uses_too_much_memory(tmp_path: Path) -> None:
    settings = "collector.max_rss_gb=0.8", "collector.max_restarts=1", "optimization.total_optim_steps=1000000"
    code, output = run(tmp_path / "run", *settings, num_leaking=9)
    assert code == 1, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    reason = summary["exit_reason"]
    assert re.match(r"collector died 2 times \(the last time: it used \d\.\d\d GB", reason), output
    assert "more than collector.max_rss_gb=0.8" in reason and "set collector.max_rss_gb=" in reason
    assert summary["collector_restarts"] == 1 and summary["gradient_steps"] > 0
    warned = [event for event in events(tmp_path / "run", "launch") if "used more memory" in event["event"]]
    assert [(event["level"], event["limit_gb"], event["counts_as_death"]) for event in warned] == [
        ("warning", 0.8, True)
    ] * 2
    assert all(event["used_gb"] > 0.8 for event in warned)


def test_a_memory_limit_that_no_collector_can_keep_ends_the_run_with_a_proposal(tmp_path: Path) -> None:
    code, output = run(tmp_path / "run", "collector.max_rss_gb=0.1")
    assert code == 2 and "collector.max_rss_gb=0.1 is below the 0." in output and "set collector.max_rss_gb=" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["collector_restarts"] == 0 and summary["exit_reason"].startswith("the collector cannot start")
