"""Isaac Lab 3's cart-pole from a camera, rendered on the CPU: 96x96 images are streamed as 64x64 bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.isaaclab3.conftest import Run
from tests.isaaclab3.truth import cartpole_reward, shrink

pytestmark = pytest.mark.isaaclab3
SETTINGS = ["env.horizon=12"]
STEP_S = 2 / 120  # by which the task multiplies its rewards
SMALL: dict[str, Any] = {"config": "isaaclab_camera", "num_envs": 4, "ticks": 30}


@pytest.fixture(scope="module")
def manager(run_isaac: Run) -> dict[str, Any]:
    return run_isaac("Isaac-Cartpole-Camera", *SETTINGS, "env.obs_groups=[policy,critic]", **SMALL)


@pytest.fixture(scope="module")
def direct(run_isaac: Run) -> dict[str, Any]:
    overrides = ["env.obs_groups=[policy,critic]", "env.image_low=-1"]
    return run_isaac("Isaac-Cartpole-Camera-Direct", *SETTINGS, *overrides, **SMALL)


@pytest.fixture(params=["manager", "direct"])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    result = request.getfixturevalue(request.param)
    assert not result["error"]
    return result | {"direct": request.param == "direct"}


def test_images_and_the_privileged_group_are_streamed(seen: dict[str, Any]) -> None:
    assert seen["spec"]["obs"] == {
        "critic": {"shape": [4], "dtype": "float32"},
        "pixels": {"shape": [64, 64, 3], "dtype": "uint8"},
    }


@pytest.mark.parametrize("part", ["obs", "acting"])
def test_the_image_shows_the_cart_where_the_same_rows_state_has_it(seen: dict[str, Any], part: str) -> None:
    gray = seen["rows"][f"{part}.pixels"].float().mean(-1)
    dark = (gray.amax((-1, -2), keepdim=True) - gray)[..., 30:36, :].sum(-2)  # the cart is dark, in these rows
    column = (dark * torch.arange(64)).sum(-1) / dark.sum(-1)
    position = seen["rows"][f"{part}.critic"][..., 0].flatten()
    lines = torch.stack([position, torch.ones_like(position)], -1)
    fitted = lines @ torch.linalg.lstsq(lines, column.view(-1, 1)).solution
    # An image of the episode before a reset would be off by several of the 64 columns.
    assert (fitted - column.view(-1, 1)).abs().max() < 1 and column.max() - column.min() > 5


def test_the_row_that_ends_an_episode_holds_the_image_just_before_the_reset(seen: dict[str, Any]) -> None:
    pixels, last = seen["rows"]["obs.pixels"], seen["rows"]["is_last"]
    num_ends = 0
    for tick, env in last.nonzero().tolist():
        raw = seen["truth"][tick][env]
        assert raw.shape == (96, 96, 3) and raw.dtype == torch.uint8
        expected = shrink(raw)
        if seen["direct"]:  # it subtracts the mean, and -1 .. 1 becomes 0 .. 255
            mean = raw.float().mean((0, 1))
            expected = (expected - mean + 255) / 2
        assert (pixels[tick, env].float() - expected).abs().max() <= 1
        num_ends += 1
    assert num_ends >= 8


def test_the_privileged_state_and_the_reward_belong_to_the_same_row(seen: dict[str, Any]) -> None:
    rows = seen["rows"]
    expected = cartpole_reward(rows["obs.critic"][1:], rows["is_terminal"][1:])
    torch.testing.assert_close(rows["reward"][1:], expected * STEP_S, rtol=1e-4, atol=1e-5)


def test_a_camera_task_streams_its_privileged_group_alone(run_isaac: Run) -> None:
    overrides = ["env.from_pixels=false", "env.obs_groups=[critic]"]
    seen = run_isaac("Isaac-Cartpole-RGB-v0", *SETTINGS, *overrides, **SMALL)  # its name in Isaac Lab 2.3
    assert not seen["error"] and seen["spec"]["obs"] == {"critic": {"shape": [4], "dtype": "float32"}}
    rows = seen["rows"]
    expected = cartpole_reward(rows["obs.critic"][1:], rows["is_terminal"][1:])
    torch.testing.assert_close(rows["reward"][1:], expected * STEP_S, rtol=1e-4, atol=1e-5)
