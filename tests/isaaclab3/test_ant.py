"""Isaac Lab 3's ants: a free base, contacts with the ground, and eight joints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.isaaclab3.conftest import Run

pytestmark = pytest.mark.isaaclab3
# Where the observation has the height of the body, the speeds of the joints (times 0.2), and the forces on the feet.
HEIGHT, SPEEDS, FEET = 0, slice(20, 28), slice(28, 52)
LOWEST = 0.5  # episodes end below; the task's own 0.31 takes longer to reach
HORIZON = 40
MINIMUM = {
    "Isaac-Ant": f"env.terminations.torso_height.params.minimum_height={LOWEST}",
    "Isaac-Ant-Direct": f"env.termination_height={LOWEST}",
}


@pytest.fixture(scope="module", params=["Isaac-Ant", "Isaac-Ant-Direct"])
def seen(request: pytest.FixtureRequest, run_isaac: Run) -> dict[str, Any]:
    overrides = [f"env.horizon={HORIZON}", f"env.isaac_overrides=[{MINIMUM[request.param]}]"]
    result = run_isaac(request.param, *overrides, config="isaaclab_ant", ticks=90)
    assert not result["error"]
    return result


def test_the_row_that_ends_an_episode_holds_the_state_just_before_the_reset(seen: dict[str, Any]) -> None:
    policy, last = seen["rows"]["obs.policy"], seen["rows"]["is_last"]
    assert policy.shape[-1] == 60 and policy.isfinite().all()
    for tick, env in last.nonzero().tolist():
        state = seen["truth"][tick][env]  # 8 positions, 8 speeds, the height
        torch.testing.assert_close(policy[tick, env, HEIGHT], state[16], rtol=0, atol=1e-6)
        torch.testing.assert_close(policy[tick, env, SPEEDS], 0.2 * state[8:16], rtol=0, atol=1e-5)
    assert int(last.sum()) > 16


def test_an_end_is_terminal_if_the_body_is_too_low_and_otherwise_a_time_out(seen: dict[str, Any]) -> None:
    rows = seen["rows"]
    assert torch.equal(rows["is_terminal"], rows["obs.policy"][..., HEIGHT] < LOWEST)
    assert rows["is_terminal"].any() and (rows["is_last"] & ~rows["is_terminal"]).any()


def test_the_ground_carries_the_body_and_the_feet_feel_it(seen: dict[str, Any]) -> None:
    policy = seen["rows"]["obs.policy"]
    assert policy[..., HEIGHT].min() > 0.15, "it does not fall through the ground"
    touching = policy[..., FEET].abs().amax(-1) > 0.01
    assert touching[20:].float().mean() > 0.5
