"""The same tests for two tiers: A, a fake isaaclab; B, the real Python layer of the installed wheel with toy physics.

Tier B replaces Kit by a stub. It is skipped if isaaclab 2.3.2.post1 is not installed; tests/requirements-isaaclab.txt
explains how to install it. Neither tier runs Isaac Sim, PhysX, USD or a renderer, so no speed seen here is that of
Isaac Lab.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.isaac_tiers import DEADLINE_S, FAKES, REPO, drive, environment, wheel_sources

NEEDS_WHEEL = pytest.mark.skipif(not wheel_sources(), reason="isaaclab 2.3.2.post1 is not installed")
CARTPOLE, DIRECT, ANYMAL = "Isaac-Cartpole-v0", "Isaac-Cartpole-Direct-v0", "Isaac-Velocity-Flat-Anymal-C-v0"
TIER_TASKS = [
    pytest.param(("A", "Fake-Manager-v0"), id="A-manager"),
    pytest.param(("A", "Fake-Direct-v0"), id="A-direct"),
    pytest.param(("B", CARTPOLE), id="B-manager", marks=NEEDS_WHEEL),
    pytest.param(("B", DIRECT), id="B-direct", marks=NEEDS_WHEEL),
    pytest.param(("B", ANYMAL), id="B-anymal", marks=NEEDS_WHEEL),
]
Seen = Callable[[tuple[str, str]], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return a function from (tier, task) to 120 ticks of 32 environments. Each runs only once."""
    return functools.cache(
        lambda tier_task: drive(tmp_path_factory.mktemp("task"), *tier_task, "env.horizon=100", num_envs=32, ticks=120)
    )


def observed(task: str, state: torch.Tensor) -> tuple[torch.Tensor, slice, torch.Tensor]:
    """Return the observed values of a raw state, their place in the observation, and the task's noise."""
    if task == DIRECT:  # pole angle and speed, cart position and speed; the state has the cart first
        return state[..., [1, 3, 0, 2]], slice(0, 4), torch.zeros(4)
    if task == ANYMAL:  # 12 joint angles relative to how it stands, 12 speeds; +-0.01 and +-1.5 of noise
        stands = torch.tensor([0.0] * 4 + [0.4, -0.4] * 2 + [-0.8, 0.8] * 2)
        noise = torch.cat([torch.full((12,), 0.01), torch.full((12,), 1.5)])
        return torch.cat([state[..., :12] - stands, state[..., 12:]], -1), slice(12, 36), noise
    return state, slice(0, 4), torch.zeros(4)


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_every_ended_episode_leaves_its_true_last_observation_and_acts_on_the_next(tier_task, seen: Seen) -> None:
    run = seen(tier_task)
    assert not run["error"]
    policy, acting, last = (run["rows"][key] for key in ("obs.policy", "acting.policy", "is_last"))
    num_ends = 0
    for tick, env in last.nonzero().tolist():
        state = run["truth"][tick].pop(env)
        expected, where, noise = observed(tier_task[1], state)
        assert ((policy[tick, env, where] - expected).abs() <= noise + 1e-5).all(), (tick, env)
        assert not torch.equal(acting[tick, env], policy[tick, env])
        num_ends += 1
    assert num_ends > 32 and num_ends == int(last.sum())
    left = [tick for tick, truth in enumerate(run["truth"]) if truth and tick > 1]
    assert not left, "environments were reset in ticks without is_last"
    torch.testing.assert_close(policy[~last], acting[~last], rtol=0, atol=0)


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_an_episode_begins_after_each_end_and_time_outs_are_not_terminal(tier_task, seen: Seen) -> None:
    rows = seen(tier_task)["rows"]
    first, last, terminal = rows["is_first"], rows["is_last"], rows["is_terminal"]
    assert first[0].all() and torch.equal(first[1:], last[:-1])
    assert terminal.any() and (last & ~terminal).any() and not (terminal & ~last).any()
    assert rows["reward"][1:][first[1:]].any(), "the first row of an episode keeps its true reward"


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_no_arrival_shares_memory_with_the_simulator(tier_task, seen: Seen) -> None:
    run = seen(tier_task)
    for name, entry in run["rows"].items():
        torch.testing.assert_close(
            run["kept"][name], entry, rtol=0, atol=0, msg=f"{name} was overwritten by later steps"
        )


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_environments_differ_and_a_seed_reproduces_them_in_a_new_process(tier_task, seen: Seen, tmp_path: Path) -> None:
    run, again = seen(tier_task), drive(tmp_path, *tier_task, "env.horizon=100", num_envs=32, ticks=120)
    assert all(torch.equal(run["rows"][name], again["rows"][name]) for name in run["rows"])
    policy = run["rows"]["obs.policy"][1:20]
    assert len({policy[:, env].numpy().tobytes() for env in range(32)}) == 32


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_changes_to_the_process_are_undone(tier_task, seen: Seen) -> None:
    expected = {
        "argv": True,
        "stdout": True,
        "handler": True,
        "fatal": [True, True],
        "gc": True,
        "launcher lives": True,
    }
    assert seen(tier_task)["facts"] == expected


@pytest.mark.parametrize("tier_task", TIER_TASKS)
def test_an_environment_with_broken_physics_becomes_zeros_and_is_reset(tier_task, tmp_path: Path) -> None:
    run = drive(tmp_path, *tier_task, "env.randomize_start=false", num_envs=4, ticks=8, nan=(4, 1))
    rows = run["rows"]
    assert all(entry.isfinite().all() for entry in rows.values()), "every streamed value is finite"
    assert not rows["obs.policy"][4, 1].any() and rows["reward"][4, 1] == 0
    assert rows["is_first"][4, 1] and rows["is_last"][4, 1] and not rows["is_terminal"][4, 1]
    assert rows["is_first"][5, 1] and rows["obs.policy"][5, 1].any()
    assert not rows["is_first"][6:, 1].any() and run["num_diverged"] == 1
    assert not rows["is_first"][1:6, [0, 2, 3]].any(), "the other environments are unchanged"
    (dump,) = tmp_path.glob("diverged-*.npz")
    assert np.load(dump)["env"].tolist() == [1] and np.isnan(np.load(dump)["obs.policy"]).any()


def facts(tier: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FAKES / "isaac_facts.py"), *arguments]
    done = subprocess.run(
        command, cwd=REPO, env=environment(tier), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("FACTS"))


@NEEDS_WHEEL
@pytest.mark.parametrize("kind", ["Manager", "Direct"])
def test_the_fake_behaves_as_the_real_classes(kind: str) -> None:
    fake = facts("A", f"Fake-{kind}-v0")
    real = facts("B", {"Manager": CARTPOLE, "Direct": DIRECT}[kind])
    assert fake == real
    assert fake["handlers are taken"] == [True, True, True] and fake["stdout is replaced"], "the facts are not empty"
    assert fake["ages of ended episodes when step returns"] == [0]
    assert fake["steps before the limit at which episodes time out"] == (kind == "Direct")
    assert fake["flags keep their memory"] and fake["unbounded"] and fake["attributes"]["episode_length_buf"]


@NEEDS_WHEEL
def test_histories_advance_one_frame_per_tick_across_episode_ends(tmp_path: Path) -> None:
    task = "tests.fakes.history_task:History-Cartpole-v0"
    run = drive(tmp_path, "B", task, "env.horizon=20", num_envs=16, ticks=60)
    assert not run["error"]
    policy, acting, last = (run["rows"][key] for key in ("obs.policy", "acting.policy", "is_last"))
    frames = policy.view(61, 16, 2, 3, 2)  # positions and speeds, frames from old to new, cart and pole
    answered = acting.view(61, 16, 2, 3, 2)
    torch.testing.assert_close(frames[1:, :, :, :2], answered[:-1, :, :, 1:], rtol=0, atol=0)
    assert last.sum() > 16
    for tick, env in last.nonzero().tolist():
        torch.testing.assert_close(frames[tick, env, :, 2].flatten(), run["truth"][tick][env], rtol=0, atol=1e-6)
        assert not torch.equal(policy[tick, env], policy[tick - 1, env])
        start = answered[tick, env]
        assert torch.equal(start[:, 0], start[:, 2]) and torch.equal(start[:, 1], start[:, 2]), "a new history"


LAUNCH_FACTS = """
from collector_proc.simulators.isaaclab import kit
kit.start_kit(device="{device}", cameras=False)
import isaacsim
(launcher,) = kit._launchers
config = launcher.app.config
assert config["multi_gpu"] is False and config["active_gpu"] == config["physics_gpu"] == {index}, config
assert [len(argv) for argv in isaacsim.SEEN_ARGV] == [1], isaacsim.SEEN_ARGV
"""


@NEEDS_WHEEL
@pytest.mark.parametrize(("device", "index"), [("cuda:0", 0), ("cuda:2", 2)])
def test_the_real_launcher_limits_kit_to_one_gpu_and_hides_our_arguments(device: str, index: int) -> None:
    script = LAUNCH_FACTS.format(device=device, index=index)
    command = [sys.executable, "-c", script, "--run-dir", "somewhere"]
    done = subprocess.run(command, cwd=REPO, env=environment("B"), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


CAMERA_CFG = """
import sys
from collector_proc.simulators.isaaclab.kit import start_kit
start_kit(device="cpu", cameras=True)
import isaaclab_tasks
from isaaclab_tasks.utils import parse_env_cfg
from collector_proc.simulators.isaaclab.task import _prepare_cameras
cfg = parse_env_cfg("Isaac-Cartpole-RGB-v0", device="cpu", num_envs=4)
before = cfg.num_rerenders_on_reset, cfg.observations.policy.image.params.get("normalize")
_prepare_cameras(cfg)
after = cfg.num_rerenders_on_reset, cfg.observations.policy.image.params["normalize"]
assert (before, after) == ((0, None), (1, False)), (before, after)
"""


@NEEDS_WHEEL
def test_the_real_camera_task_is_configured_for_bytes_of_the_new_episode() -> None:
    command = [sys.executable, "-c", CAMERA_CFG]
    done = subprocess.run(command, cwd=REPO, env=environment("B"), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
