"""What Isaac Lab 3's cart-poles stream: last observations, both kinds of ends, rewards, horizons, and divergence.

The observation of Isaac-Cartpole and Isaac-Cartpole-Direct is (position of the cart, angle of the pole, the speed of
each), relative to defaults of zero. So it equals the first four numbers of the state that the driver reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.isaaclab3.conftest import Run
from tests.isaaclab3.truth import cartpole_reward

pytestmark = pytest.mark.isaaclab3
HORIZON = 60
TICKS = 120
# With three times the task's force, some carts leave their rail before the time is up.
SETTINGS = [f"env.horizon={HORIZON}", "env.action_scale=3"]
RAIL = 3.0
BROKEN = (30, 5)  # NaN is written before this tick into this environment


@pytest.fixture(scope="module")
def direct(run_isaac: Run) -> dict[str, Any]:
    return run_isaac("Isaac-Cartpole-Direct", *SETTINGS, ticks=TICKS)


@pytest.fixture(scope="module")
def broken(run_isaac: Run) -> dict[str, Any]:
    return run_isaac("Isaac-Cartpole-Direct", *SETTINGS, ticks=BROKEN[0] + 40, nan=BROKEN)


@pytest.fixture(scope="module")
def manager(run_isaac: Run) -> dict[str, Any]:
    overrides = ["env.isaac_overrides=[physics=newton_mjwarp,env.decimation=4]", "env.randomize_start=false"]
    return run_isaac("Isaac-Cartpole", *SETTINGS, *overrides, ticks=TICKS)


@pytest.fixture(params=["direct", "manager"])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    result = request.getfixturevalue(request.param)
    assert not result["error"]
    return result


def test_the_row_that_ends_an_episode_holds_the_state_just_before_the_reset(seen: dict[str, Any]) -> None:
    policy, acting, last = (seen["rows"][key] for key in ("obs.policy", "acting.policy", "is_last"))
    ends = last.nonzero().tolist()
    assert len(ends) > 16
    for tick, env in ends:
        torch.testing.assert_close(policy[tick, env], seen["truth"][tick][env][:4], rtol=0, atol=1e-6)
        assert not torch.equal(acting[tick, env], policy[tick, env]), "the policy acts on the next episode"
    assert sum(map(len, seen["truth"])) == len(ends), "nothing else was reset"
    assert torch.equal(policy[~last], acting[~last])


def test_an_end_is_terminal_if_the_cart_left_its_rail_and_otherwise_a_time_out(seen: dict[str, Any]) -> None:
    rows = seen["rows"]
    outside = rows["obs.policy"][..., 0].abs() > RAIL
    assert torch.equal(rows["is_terminal"], outside)
    assert rows["is_terminal"].any() and (rows["is_last"] & ~rows["is_terminal"]).any()
    assert torch.equal(rows["is_first"][1:], rows["is_last"][:-1])


def test_an_episode_times_out_after_exactly_the_horizon(seen: dict[str, Any]) -> None:
    last, terminal = seen["rows"]["is_last"], seen["rows"]["is_terminal"]
    lengths = []
    for env in range(last.shape[1]):
        ends = last[:, env].nonzero().flatten().tolist()
        pairs = zip(ends[:-1], ends[1:], strict=True)
        lengths += [end - start for start, end in pairs if not terminal[end, env]]
    whole = seen["rows"]["is_last"][:, -1].nonzero()[0].item()  # the last environment starts at age 0
    assert terminal[whole, -1] or whole == HORIZON
    assert lengths and set(lengths) == {HORIZON}


def test_the_reward_is_that_of_the_rows_own_observation(seen: dict[str, Any]) -> None:
    rows = seen["rows"]
    expected = cartpole_reward(rows["obs.policy"][1:], rows["is_terminal"][1:])
    # The task multiplies its rewards by the seconds of a step.
    torch.testing.assert_close(rows["reward"][1:], expected * seen["task"]["step_dt"], rtol=1e-4, atol=1e-5)


def test_arrivals_own_their_memory(seen: dict[str, Any]) -> None:
    assert all(torch.equal(seen["kept"][name], entry) for name, entry in seen["rows"].items())


def test_the_process_is_as_before_and_no_file_is_left_in_its_folder(seen: dict[str, Any]) -> None:
    facts = dict(seen["facts"])
    assert not facts.pop("launcher lives"), "Kit was started"
    assert facts == {"argv": True, "stdout": True, "handler": True, "fatal": [True, True], "gc": True}
    folder: Path = seen["folder"]
    assert not list((folder / "cwd").iterdir())


def test_overrides_change_the_physics_steps_of_each_agent_step(direct: dict, manager: dict) -> None:
    assert direct["task"]["step_dt"] == pytest.approx(2 / 120)
    assert manager["task"]["step_dt"] == pytest.approx(4 / 120)
    for seen, step_s in ((direct, 2 / 120), (manager, 4 / 120)):
        cart, speed = seen["rows"]["obs.policy"][..., 0], seen["rows"]["obs.policy"][..., 2]
        going_on = ~seen["rows"]["is_last"][:-1]
        moved = (cart[1:] - cart[:-1])[going_on]
        travelled = ((speed[1:] + speed[:-1]) / 2 * step_s)[going_on]
        assert float((moved @ travelled) / (travelled @ travelled)) == pytest.approx(1, rel=0.1)


def test_nan_in_one_environment_is_masked_and_the_environment_recovers(broken: dict[str, Any]) -> None:
    assert not broken["error"]
    rows, (tick, env) = broken["rows"], BROKEN
    assert all(entry.isfinite().all() for entry in rows.values())
    assert not rows["obs.policy"][tick, env].any() and rows["reward"][tick, env] == 0
    assert rows["is_first"][tick, env] and rows["is_last"][tick, env] and not rows["is_terminal"][tick, env]
    assert rows["is_first"][tick + 1, env] and not rows["is_last"][tick + 1, env], "a new episode begins"
    after = rows["obs.policy"][tick + 1 :, env]
    assert (after[1:] != after[:-1]).any(-1).all(), "it moves"
    assert broken["num_diverged"] == 1
    assert len(list(broken["folder"].glob("diverged-*.npz"))) == 1


def test_nan_in_one_environment_changes_no_bit_of_the_others(broken: dict[str, Any], direct: dict[str, Any]) -> None:
    tick, broken_env = BROKEN
    num_later = 0
    for env in set(range(16)) - {broken_env}:
        # A reset draws random numbers for all environments together, so the episodes that begin afterwards differ.
        ends = direct["rows"]["is_last"][tick:, env].nonzero().flatten().tolist()
        until = min(tick + (ends[0] if ends else TICKS), tick + 40) + 1
        for name in ("obs.policy", "reward", "is_last", "is_terminal", "is_first"):
            assert torch.equal(broken["rows"][name][:until, env], direct["rows"][name][:until, env]), (name, env)
        num_later += until - tick
    assert num_later > 100
