"""Laws of what is streamed of a torchrl environment: its observations, without what only keeps account of the run."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from structlog.testing import capture_logs

from collector_proc.simulators.torchrl.specs import chosen_observations

FAKES = Path(__file__).resolve().parents[3] / "fakes"
TALLIES = {"episode_reward", "is_init", "step_count"}


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


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("batch", ["SerialEnv", "ParallelEnv"])
def test_accounts_that_workers_keep_are_left_out_too(fakes: ModuleType, batch: str, outer: bool) -> None:
    workers = fakes.make_workers(batch, 2)
    streamed, (said,) = chosen(fakes.transformed(workers, fakes.RewardSum()) if outer else workers)
    assert streamed == {"extra_push", "where"}
    assert set(said["left_out"]) == TALLIES


def test_a_worker_environment_made_to_be_looked_at_is_closed_and_one_that_runs_is_not(fakes: ModuleType) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(fakes.make_tallied())
        return made[-1]

    parallel = fakes.ParallelEnv(2, make)
    made.clear()  # torchrl looks at one itself
    chosen(parallel)
    assert [env.is_closed for env in made] == [True]
    serial = fakes.SerialEnv(2, make)
    serial.reset()
    made.clear()
    chosen(serial)
    assert made == [] and not serial.is_closed
    serial.close()


def test_where_no_worker_can_be_looked_at_what_is_called_like_bookkeeping_is_warned_of(fakes: ModuleType) -> None:
    workers = fakes.make_workers("ParallelEnv", 2)

    def fail() -> Any:
        raise OSError("no second one in this process")

    workers.create_env_fn = [fail, fail]
    streamed, (doubtful, said) = chosen(workers)
    assert streamed == {"extra_push", "where", *TALLIES} and said["log_level"] == "info"
    assert doubtful["log_level"] == "warning" and set(doubtful["streamed"]) == TALLIES
    assert "set env.obs_groups" in doubtful["event"]
    streamed, _ = chosen(fakes.transformed(workers, fakes.RewardSum()))  # an outer one of the same name tells
    assert streamed == {"extra_push", "where", "is_init", "step_count"}
