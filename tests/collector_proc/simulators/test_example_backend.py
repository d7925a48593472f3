"""A new backend is one folder and one row of the registry: the example in tests/fakes/example_backend shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from collector_proc.simulators.registry import BACKENDS, ENV_COUNTS, TASK_CHOICES, Backend, build_simulator, check_env
from launcher.children import COMMANDS
from shared.config import Settings
from shared.errors import SettingError

REPO = Path(__file__).resolve().parents[3]
FOLDER = REPO / "tests" / "fakes" / "example_backend"
ROW = Backend("tests.fakes.example_backend", "PointSimulator", ignores=(*TASK_CHOICES, *ENV_COUNTS))
# A user writes the row into registry.py. Here, each process of the run adds it before it starts.
PROCESS = f"""
import sys
from collector_proc.simulators import ending
from collector_proc.simulators.registry import BACKENDS, Backend
BACKENDS["example"] = {ROW!r}
"""
COLLECTOR = PROCESS + "from collector_proc.__main__ import main\nending.run(main)\n"
COMMANDS_WITH_ROW = {**COMMANDS, "collector": (sys.executable, "-c", COLLECTOR)}
LAUNCH = PROCESS + f"import launch\nsys.exit(launch.main(commands={COMMANDS_WITH_ROW!r}))\n"
SMALL = [
    "--config", "quickstart", "env.backend=example", "env.name=point", "env.task=''", "env.num_envs=4",
    "env.horizon=10", "collector.eval_envs=1", "collector.frames_per_batch=40", "collector.init_random_frames=80",
    "networks.state_dim=4", "networks.rssm_hidden_dim=16", "networks.hidden_dim=16", "replay_buffer.batch_size=64",
    "replay_buffer.batch_length=8", "optimization.log_every=5", "optimization.total_optim_steps=20",
    "optimization.replay_ratio=4", "logger.backend=none",
]  # fmt: skip


def settings_for(name: str = "point") -> Settings:
    settings = Settings()
    env = settings.env
    env.backend, env.name, env.task, env.num_envs, env.from_pixels = "example", name, "", 3, False
    return settings


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "example", ROW)


def test_the_example_has_fewer_than_60_lines() -> None:
    sources = sorted(FOLDER.glob("*.py"))
    assert [path.name for path in sources] == ["checks.py", "simulator.py"]
    assert sum(len(path.read_text().splitlines()) for path in sources) < 60


def test_the_registry_calls_the_checks_of_the_example() -> None:
    check_env(settings_for())
    with pytest.raises(
        SettingError, match=r"env.name=pont is not a task .*; expected one of point; set env.name=point$"
    ):
        check_env(settings_for("pont"))
    settings = settings_for()
    settings.env.obs_groups = ["policy"]
    with pytest.raises(SettingError, match=r"env.obs_groups=.* has no effect with env.backend=example"):
        check_env(settings)


def test_the_arrivals_of_the_example_follow_the_contract() -> None:
    simulator = build_simulator(settings_for(), seed=0, device="cpu")
    arrival = simulator.reset()
    assert arrival.is_first.all() and not arrival.reward.any()
    for _ in range(100):
        before, arrival = arrival, simulator.step(torch.tensor([[-1.0], [0.0], [1.0]]))
        assert torch.equal(arrival.is_first, before.is_last)
        assert not arrival.reward[arrival.is_first].any()
        assert torch.equal(arrival.is_terminal, arrival.obs["policy"][:, 0].abs() > 2)
        assert not (arrival.is_terminal & ~arrival.is_last).any()


def test_launch_trains_on_the_example(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCH, *SMALL, "--run-dir", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["gradient_steps"] == 20 and last["episodes"] > 0
