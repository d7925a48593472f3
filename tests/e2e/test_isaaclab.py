"""Whole runs of the isaaclab backend through launch.py, with a fake of the isaaclab package and without Isaac Sim."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from shared.progress import read
from tests.fakes.isaac_tiers import environment

REPO = Path(__file__).parents[2]
SMALL = [
    "--config", "isaaclab", "env.name=Fake-Manager-v0", "env.num_envs=16",
    "collector.eval_envs=2", "collector.frames_per_batch=160", "collector.init_random_frames=320",
    "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16",
    "replay_buffer.buffer_size=16000", "replay_buffer.batch_size=64", "replay_buffer.batch_length=8",
    "optimization.imagination_starts=null",
    "optimization.log_every=5", "optimization.autocast=false", "optimization.compile.enabled=false",
    "optimization.replay_ratio=4", "deadlines.stop_s=8",
]  # fmt: skip
DEADLINE_S = 600.0


def start(run_dir: Path, *overrides: str, **switches: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "launch.py"), "--run-dir", str(run_dir), *SMALL, *overrides]
    env = environment("A", FAKE_RECORD=str(run_dir.with_name("record")), **switches)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO, env=env)


def finish(launch: subprocess.Popen[str]) -> str:
    try:
        return launch.communicate(timeout=DEADLINE_S)[0]
    except subprocess.TimeoutExpired:
        launch.kill()
        raise


def launches(run_dir: Path) -> list[dict]:
    """Return what the fake AppLauncher recorded: one entry for each incarnation."""
    return [json.loads(line) for line in run_dir.with_name("record").read_text().splitlines()]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_ends_although_closing_hangs_and_torch_is_imported_after_the_launcher(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch = start(run_dir, "optimization.total_optim_steps=40", FAKE_HANG_CLOSE="1")
    output = finish(launch)
    assert launch.returncode == 0, output
    result = summary(run_dir)
    assert result["exit_reason"] == "finished" and result["gradient_steps"] == 40
    assert result["collector_restarts"] == 0 and result["episodes"] > 0
    assert result["env_frames"] == result["agent_steps"], "every row is an agent step: no tick is spent on resets"
    (recorded,) = launches(run_dir)
    assert not recorded["torch"] and len(recorded["argv"]) == 1
    assert "closing the simulator took more than 4 s" in (run_dir / "logs" / "collector.out").read_text()
    assert not alive(recorded["pid"])


def test_a_collector_that_kit_ends_with_exit_code_0_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch = start(run_dir, "optimization.total_optim_steps=400", FAKE_CRASH=f"75:{tmp_path / 'crashed'}")
    end = time.monotonic() + DEADLINE_S
    learner = None
    while launch.poll() is None and (not (run_dir.with_name("record")).exists() or len(launches(run_dir)) < 2):
        assert time.monotonic() < end, "no second incarnation"
        if (run_dir / "learner.progress").exists():
            learner = read(run_dir / "learner.progress").pid or learner
        time.sleep(0.05)
    if launch.poll() is None:
        assert read(run_dir / "learner.progress").pid == learner
    output = finish(launch)
    assert launch.returncode == 0 and "collector died (exit code 0)" in output, output
    assert summary(run_dir)["collector_restarts"] == 1 and summary(run_dir)["gradient_steps"] == 400
    assert len({recorded["pid"] for recorded in launches(run_dir)}) == 2


def test_sigterm_ends_the_run_although_kit_replaces_its_handler(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch = start(run_dir, "optimization.total_optim_steps=1000000")
    end = time.monotonic() + DEADLINE_S
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert time.monotonic() < end and launch.poll() is None, finish(launch)
        time.sleep(0.05)
    collector = read(run_dir / "collector.progress").pid
    os.kill(collector, signal.SIGTERM)  # only the collector ends, and launch starts another
    while len(launches(run_dir)) != 2:
        assert time.monotonic() < end and launch.poll() is None, "the collector did not react to SIGTERM"
        time.sleep(0.05)
    assert not alive(collector)
    launch.send_signal(signal.SIGTERM)
    output = finish(launch)
    assert launch.returncode == 143, output
    assert summary(run_dir)["exit_reason"] == "interrupted by SIGTERM"
    assert not any(alive(recorded["pid"]) for recorded in launches(run_dir))


def test_an_unknown_task_ends_the_run_and_a_similar_name_is_proposed(tmp_path: Path) -> None:
    launch = start(tmp_path / "run", "env.name=Fake-Manger-v0")
    output = finish(launch)
    assert launch.returncode == 2 and "env.name=Fake-Manger-v0 is not a task" in output and "Fake-Manager-v0" in output
    assert len(launches(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--config", "isaaclab", "env.name=Fake-Manager-v0", "env.num_envs=4"], 0, ["all checks passed", "closed in"]),
        (
            ["--config", "isaaclab", "env.name=Fake-Endless-v0", "env.num_envs=4", "--ticks", "2"],
            0,
            ["no episode ended in 2 ticks"],
        ),
        (["--config", "quickstart"], 0, ["all checks passed", "pendulum swingup, 8 environments"]),
        (["env.num_envs=4", "--config", "quickstart", "env.horizon=7"], 0, ["4 environments, cpu, horizon 7"]),
        pytest.param(
            ["--config", "gym", "env.name=tests.fakes.counting_env:make_same_step", "env.num_envs=2"],
            0,
            ["all checks passed", "horizon None"],
            marks=pytest.mark.skipif(find_spec("torchrl") is None, reason="this environment has no torchrl"),
        ),
        (["--config", "isaaclab", "env.name=Fake-Discrete-v0", "env.num_envs=4"], 1, ["FAILED", "Discrete(3)"]),
    ],
)
def test_the_probe_reports_the_problems_that_a_collector_would_have(
    arguments: list[str], code: int, words: list[str], tmp_path: Path
) -> None:
    command, env = [sys.executable, "-m", "launcher.probe", *arguments], environment("A", TMPDIR=str(tmp_path))
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == code, done.stdout + done.stderr
    assert all(word in done.stdout for word in words), done.stdout
    assert not list(tmp_path.glob("tandem-probe-*")), "an empty folder is left"


def test_the_probe_finds_divergence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.probe", "--config", "isaaclab"]
    command += ["env.name=Fake-Manager-v0", "env.num_envs=4"]
    env = environment("A", FAKE_NAN="4:1")
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1 and "FAILED 1 rows diverged" in done.stdout, done.stdout + done.stderr
    (where,) = [
        line.split()[-1]
        for line in done.stdout.splitlines()
        if line.startswith("states that are not finite are written to")
    ]
    assert len(list(Path(where).glob("diverged-*.npz"))) == 1
