"""Laws of what is streamed of a torchrl environment: its observations, without what only keeps account of the run."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from structlog.testing import capture_logs

from collector_proc.simulators.torchrl_specs import chosen_observations

FAKES = Path(__file__).resolve().parents[2] / "fakes"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FAKES))
    return importlib.import_module("counting_env")


def chosen(env: Any, wanted: list[str] | None = None) -> tuple[set[str], list[Any]]:
    """The names of what is streamed, and the log."""
    with capture_logs() as logs:
        keys = chosen_observations(env, wanted)
    return set(keys), logs


def test_what_keeps_account_of_the_run_is_left_out_with_a_warning(fakes: ModuleType) -> None:
    streamed, (said,) = chosen(fakes.make_accounts(2))
    assert streamed == set(said["streamed"]) == {"extra_push", "joined", "timed", "where"}
    assert set(said["left_out"]) == {"step_count", "episode_reward", "is_init", "traj_count", "return_so_far"}
    assert said["log_level"] == "warning" and "env.obs_groups" in said["event"]


def test_what_obs_groups_leaves_out_needs_no_warning(fakes: ModuleType) -> None:
    streamed, (said,) = chosen(fakes.make_batched(2), ["where"])
    assert streamed == {"where"} and said["left_out"] == ["extra_push"] and said["log_level"] == "info"


def test_an_observation_that_a_users_own_transform_makes_of_the_reward_is_streamed(fakes: ModuleType) -> None:
    streamed, (said,) = chosen(fakes.make_last_reward(2))
    assert streamed == {"extra_push", "last_reward", "where"}
    assert said["left_out"] == [] and said["log_level"] == "info"
