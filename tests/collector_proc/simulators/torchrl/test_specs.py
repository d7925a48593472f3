"""The observations of a torchrl environment that are streamed: all but entries that only describe the run."""

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


def chosen(env: Any, groups: list[str] | None = None) -> tuple[set[str], list[Any]]:
    """Return the names of the streamed observations and the log."""
    with capture_logs() as logs:
        keys = chosen_observations(env, groups)
    return set(keys), logs


def test_entries_that_only_describe_the_run_are_left_out_with_a_warning(fakes: ModuleType) -> None:
    streamed, (logged,) = chosen(fakes.make_accounts(2))
    assert streamed == set(logged["streamed"]) == {"extra_push", "joined", "timed", "where"}
    assert set(logged["left_out"]) == {"step_count", "episode_reward", "is_init", "traj_count", "return_so_far"}
    assert logged["log_level"] == "warning" and "env.obs_groups" in logged["event"]


def test_entries_that_obs_groups_leaves_out_cause_no_warning(fakes: ModuleType) -> None:
    streamed, (logged,) = chosen(fakes.make_batched(2), ["where"])
    assert streamed == {"where"} and logged["left_out"] == ["extra_push"] and logged["log_level"] == "info"


def test_an_observation_that_a_users_transform_computes_from_the_reward_is_streamed(fakes: ModuleType) -> None:
    streamed, (logged,) = chosen(fakes.make_last_reward(2))
    assert streamed == {"extra_push", "last_reward", "where"}
    assert logged["left_out"] == [] and logged["log_level"] == "info"


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("batch", ["SerialEnv", "ParallelEnv"])
def test_step_counts_of_worker_environments_are_left_out_too(fakes: ModuleType, batch: str, outer: bool) -> None:
    workers = fakes.make_workers(batch, 2)
    streamed, (logged,) = chosen(fakes.transformed(workers, fakes.RewardSum()) if outer else workers)
    assert streamed == {"extra_push", "where"}
    assert set(logged["left_out"]) == TALLIES


def test_a_temporary_worker_environment_is_closed_and_a_running_one_is_not(fakes: ModuleType) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(fakes.make_tallied())
        return made[-1]

    parallel = fakes.ParallelEnv(2, make)
    made.clear()  # torchrl itself creates one
    chosen(parallel)
    assert [env.is_closed for env in made] == [True]
    serial = fakes.SerialEnv(2, make)
    serial.reset()
    made.clear()
    chosen(serial)
    assert made == [] and not serial.is_closed
    serial.close()


def test_without_a_worker_environment_names_used_for_step_counts_cause_a_warning(fakes: ModuleType) -> None:
    workers = fakes.make_workers("ParallelEnv", 2)

    def fail() -> Any:
        raise OSError("no second one in this process")

    workers.create_env_fn = [fail, fail]
    streamed, (doubtful, logged) = chosen(workers)
    assert streamed == {"extra_push", "where", *TALLIES} and logged["log_level"] == "info"
    assert doubtful["log_level"] == "warning" and set(doubtful["streamed"]) == TALLIES
    assert "set env.obs_groups" in doubtful["event"]
    # the outer transform reveals the entry of the same name
    streamed, _ = chosen(fakes.transformed(workers, fakes.RewardSum()))
    assert streamed == {"extra_push", "where", "is_init", "step_count"}
