"""Last observations in the two cases in which Isaac Lab 3's own are wrong, and tasks that reset in a way of their own.

The second half of each run also sets cfg.compute_final_obs, to see whether Isaac Lab's own are still wrong. Once they
are right, `collector_proc/simulators/isaaclab/terminal_observations.py` is not needed for Isaac Lab 3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.isaaclab3.conftest import Run

pytestmark = pytest.mark.isaaclab3
TASKS = "tests.isaaclab3.tasks"
TICKS, NATIVE_FROM = 160, 81
SETTINGS = ["env.horizon=30", "env.action_scale=3"]


@pytest.fixture(scope="module")
def history(run_isaac: Run) -> dict[str, Any]:
    return run_isaac(f"{TASKS}:History-Cartpole", *SETTINGS, ticks=TICKS, native_from=NATIVE_FROM)


@pytest.fixture(scope="module")
def view(run_isaac: Run) -> dict[str, Any]:
    return run_isaac(f"{TASKS}:View-Cartpole-Direct", *SETTINGS, ticks=TICKS, native_from=NATIVE_FROM)


@pytest.fixture(scope="module")
def delegating(run_isaac: Run) -> dict[str, Any]:
    return run_isaac(f"{TASKS}:Delegating-Cartpole-Direct", *SETTINGS, ticks=80)


def newest(policy: torch.Tensor) -> torch.Tensor:
    """Return the newest frame of a history of three, as (cart, pole, speed of the cart, speed of the pole)."""
    return torch.cat([policy[..., 4:6], policy[..., 10:12]], -1)


def whole(policy: torch.Tensor) -> torch.Tensor:
    return policy


def ends(seen: dict[str, Any], first_tick: int = 0) -> list[tuple[int, int]]:
    assert not seen["error"]
    found = [(tick, env) for tick, env in seen["rows"]["is_last"].nonzero().tolist() if tick >= first_tick]
    assert len(found) > 16
    return found


@pytest.mark.parametrize(("task", "frame"), [("history", newest), ("view", whole), ("delegating", whole)])
def test_the_row_that_ends_an_episode_holds_the_state_just_before_the_reset(task, frame, request) -> None:
    seen = request.getfixturevalue(task)
    policy = frame(seen["rows"]["obs.policy"])
    for tick, env in ends(seen):
        state = seen["truth"][tick][env][: policy.shape[-1]]
        torch.testing.assert_close(policy[tick, env], state, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("task", "frame"), [("history", newest), ("view", whole)])
def test_isaac_labs_own_final_observations_are_still_wrong(task, frame, request) -> None:
    seen = request.getfixturevalue(task)
    errors = []
    for tick, env in ends(seen, NATIVE_FROM):
        observed = frame(seen["native"][tick][env])
        errors.append(float((observed - seen["truth"][tick][env][: len(observed)]).abs().max()))
    assert max(errors) > 0.1, "Isaac Lab was repaired: its cfg.compute_final_obs can replace our hook"


def test_the_older_frames_of_a_history_are_those_of_the_rows_before(history: dict[str, Any]) -> None:
    rows = history["rows"]
    policy, first = rows["obs.policy"], rows["is_first"]
    frames = [torch.cat([policy[..., 2 * i : 2 * i + 2], policy[..., 6 + 2 * i : 8 + 2 * i]], -1) for i in range(3)]
    for age in (1, 2):
        # A row that is first holds its episode's second observation, so histories reach at most to its row.
        same = torch.stack([~first[age - back : len(first) - back] for back in range(age)]).all(0)
        same[0] = False  # the first row of all is the observation of a reset
        torch.testing.assert_close(frames[2 - age][age:][same], frames[2][:-age][same], rtol=0, atol=0)
        assert int(same.sum()) > 1000 and int((same & rows["is_last"][age:]).sum()) > 16


def test_a_task_that_resets_by_a_mask_is_refused_with_the_fix(run_isaac: Run) -> None:
    seen = run_isaac(f"{TASKS}:Mask-Cartpole-Direct", *SETTINGS, ticks=5)
    assert seen["error"].startswith("SimulatorError: MaskCartpole resets ended episodes by a mask or without calling")
    assert "if cfg.compute_final_obs is set" in seen["error"]
