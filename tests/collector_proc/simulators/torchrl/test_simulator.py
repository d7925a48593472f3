"""The torchrl backend: batched environments, copies, and torchrl's own wrappers of gymnasium and dm_control."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import gymnasium
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from collector_proc.simulators.base import Arrival
from collector_proc.simulators.dm_control.environment import environment_seed
from collector_proc.simulators.registry import build_simulator, check_env
from collector_proc.simulators.torchrl.simulator import EnvRows, TorchrlSimulator, common_bounds
from shared.config import Settings
from shared.errors import SettingError, SimulatorError

FAKES = Path(__file__).resolve().parents[3] / "fakes"
BOTH = pytest.mark.parametrize("make", ["make_batched", "make_single"])


@pytest.fixture(autouse=True)
def counting_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    import counting_env  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(counting_env, "singles", itertools.count())


def settings_for(name: str, num_envs: int | None, **env: object) -> Settings:
    settings = Settings()
    defaults = {"backend": "torchrl", "name": name, "task": "", "num_envs": num_envs}
    for key, value in {**defaults, "from_pixels": False, "frame_skip": 1, **env}.items():
        assert hasattr(settings.env, key), key
        setattr(settings.env, key, value)
    return settings


def simulator_of(name: str, num_envs: int, *, seed: int = 0, **env: object) -> TorchrlSimulator:
    simulator = build_simulator(settings_for(name, num_envs, **env), seed=seed, device="cpu")
    assert isinstance(simulator, TorchrlSimulator)
    return simulator


def play(simulator: TorchrlSimulator, num_ticks: int) -> list[Arrival]:
    """Return the reset and num_ticks steps; the action of a tick is its number / 100."""
    shape = (simulator.spec.num_envs, simulator.spec.action_dim)
    return [simulator.reset(), *(simulator.step(torch.full(shape, tick / 100)) for tick in range(1, num_ticks + 1))]


def column(arrivals: list[Arrival], entry: str, env: int) -> list[float]:
    """Return one environment's flag, reward, or number in "where", over all ticks."""
    if entry in ("is_first", "is_last", "is_terminal", "reward"):
        return [getattr(arrival, entry)[env].item() for arrival in arrivals]
    source, number = ("obs" if entry.startswith("obs") else "acting_obs"), int(entry[-1])
    return [getattr(arrival, source)["where"][env, number].item() for arrival in arrivals]


@BOTH
def test_the_row_of_an_ended_episode_holds_its_last_observation_and_the_next_row_is_first(make: str) -> None:
    simulator = simulator_of(f"counting_env:{make}", 2)
    arrivals = play(simulator, 7)
    episode = column(arrivals, "obs1", 0)[0]
    # Row 0 terminates at frame 5. Its observation is of the old episode; the policy acts on the new one.
    assert column(arrivals, "obs0", 0) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert column(arrivals, "obs1", 0) == [episode] * 6 + [episode + 1] * 2
    assert column(arrivals, "acting1", 0) == [episode] * 5 + [episode + 1] * 3
    assert column(arrivals, "is_last", 0) == [0, 0, 0, 0, 0, 1, 0, 0]
    assert column(arrivals, "is_terminal", 0) == [0, 0, 0, 0, 0, 1, 0, 0]
    assert column(arrivals, "is_first", 0) == [1, 0, 0, 0, 0, 0, 1, 0]
    assert column(arrivals, "reward", 0) == [0, 1, 2, 3, 4, 5, 6, 7]
    # Row 1 times out at frame 6.
    assert column(arrivals, "obs0", 1) == [1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007]
    assert column(arrivals, "is_last", 1) == [0, 0, 0, 0, 0, 0, 1, 0]
    assert not any(column(arrivals, "is_terminal", 1))
    assert column(arrivals, "is_first", 1) == [1, 0, 0, 0, 0, 0, 0, 1]


def test_a_batch_and_copies_of_the_same_rows_give_the_same_stream() -> None:
    batched = play(simulator_of("counting_env:make_batched", 3), 30)
    copied = play(simulator_of("counting_env:make_single", 3), 30)
    assert any(arrival.is_last.any() for arrival in batched)
    for one, other in zip(batched, copied, strict=True):
        assert torch.equal(one.reward, other.reward)
        assert torch.equal(one.is_last, other.is_last)
        assert torch.equal(one.is_first, other.is_first)
        assert torch.equal(one.is_terminal, other.is_terminal)
        assert torch.equal(one.obs["where"][:, 0], other.obs["where"][:, 0])
        assert torch.equal(one.obs["extra_push"], other.obs["extra_push"])


@BOTH
def test_an_action_repeat_sums_rewards_and_stops_at_the_end_of_the_episode(make: str) -> None:
    simulator = simulator_of(f"counting_env:{make}", 2, frame_skip=2)
    assert simulator.frames_per_step == 2
    arrivals = play(simulator, 3)
    assert column(arrivals, "reward", 0) == [0, 1 + 2, 3 + 4, 5]  # five frames: the last repeat has one frame
    assert column(arrivals, "obs0", 0)[-1] == 5
    assert column(arrivals, "is_last", 0) == [0, 0, 0, 1]
    assert column(arrivals, "reward", 1) == [0, 1 + 2, 3 + 4, 5 + 6]
    assert column(arrivals, "is_last", 1) == [0, 0, 0, 1]


@BOTH
def test_a_horizon_ends_episodes_as_time_outs(make: str) -> None:
    arrivals = play(simulator_of(f"counting_env:{make}", 2, horizon=3), 7)
    assert column(arrivals, "is_last", 0) == [0, 0, 0, 1, 0, 0, 1, 0]
    assert not any(column(arrivals, "is_terminal", 0))
    assert column(arrivals, "is_first", 0) == [1, 0, 0, 0, 1, 0, 0, 1]


def test_a_row_that_is_not_finite_becomes_an_empty_episode_and_is_counted() -> None:
    simulator = simulator_of("counting_env:make_diverging", 2)
    arrivals = play(simulator, 4)
    assert column(arrivals, "obs0", 0) == [0, 1, 2, 0, 4]
    assert column(arrivals, "reward", 0) == [0, 1, 2, 0, 4]
    assert column(arrivals, "is_first", 0) == [1, 0, 0, 1, 1]
    assert column(arrivals, "is_last", 0) == [0, 0, 0, 1, 0]
    assert not any(column(arrivals, "is_terminal", 0))
    assert simulator.num_diverged == 2  # frame 3 of both rows


@BOTH
def test_an_arrival_does_not_change_when_the_environment_overwrites_its_buffers(make: str) -> None:
    simulator = simulator_of(f"counting_env:{make}", 2)
    first = simulator.reset()
    kept = first.obs["where"].clone()
    later = [simulator.step(torch.full((2, 1), tick / 10)).obs["where"] for tick in range(4)]
    assert torch.equal(first.obs["where"], kept)
    assert [entry[1, 0].item() for entry in later] == [1001, 1002, 1003, 1004]


@BOTH
def test_actions_are_mapped_onto_the_bounds(make: str) -> None:
    simulator = simulator_of(f"counting_env:{make}", 3)
    simulator.reset()
    arrival = simulator.step(torch.tensor([[-1.0], [0.0], [1.0]]))
    assert arrival.obs["extra_push"].flatten().tolist() == [-2.0, 1.0, 4.0]


def test_images_arrive_as_64x64_bytes_beside_the_chosen_vectors() -> None:
    simulator = simulator_of("counting_env:make_images", 2, from_pixels=True, obs_groups=["camera", "where"])
    pixels = simulator.reset().obs["pixels"]
    assert set(simulator.spec.obs) == {"pixels", "where"}
    assert pixels.shape == (2, 64, 64, 3)
    assert pixels.dtype == torch.uint8
    assert int(pixels.min()) == int(pixels.max()) == 200


def test_infos_are_left_out_with_a_warning_unless_obs_groups_names_them() -> None:
    with capture_logs() as logs:
        assert set(simulator_of("counting_env:make_infos", 2).spec.obs) == {"observation"}
    (warned,) = [line for line in logs if line["log_level"] == "warning"]
    assert warned["left_out"] == ["speed"] and "env.obs_groups" in warned["event"]
    chosen = simulator_of("counting_env:make_infos", 2, obs_groups=["observation", "speed"])
    assert set(chosen.reset().obs) == {"observation", "speed"}


def test_step_counts_are_streamed_if_obs_groups_names_them() -> None:
    simulator = simulator_of("counting_env:make_accounts", 2, obs_groups=["where", "step_count"])
    assert set(simulator.spec.obs) == {"step_count", "where"}
    assert [arrival.obs["step_count"][0].item() for arrival in play(simulator, 3)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["make_wordy", "make_colliding"])
def test_observations_that_cannot_be_streamed_are_ignored_if_others_are_chosen(name: str) -> None:
    simulator = simulator_of(f"counting_env:{name}", 2, obs_groups=["where"])
    assert column(play(simulator, 3), "obs0", 1) == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "counting_env:make_three",
            r"env.num_envs=2 does not fit.*batch size is \[3\]; expected 3.*set env.num_envs=3",
        ),
        ("counting_env:make_discrete", r"actions are \{'action': 'OneHot'\}; expected one entry of continuous numbers"),
        ("counting_env:make_nothing", r"returns a dict; expected a torchrl EnvBase; wrap it"),
        (
            "counting_env:make_wordy",
            r"'word' is not a tensor but a NonTensor; expected.*env.obs_groups=\[extra_push,where\]",
        ),
        (
            "counting_env:make_colliding",
            r"\['extra', 'push'\] and \['extra_push'\] would both be streamed as 'extra_push'; .*rename",
        ),
        ("counting_env:make_only_accounts", r"observes step_count, which only describes the run; .*set env.obs_groups"),
        ("gym:CartPole-v1", r"actions are \{'action': 'OneHot'\}; expected one entry of continuous"),
    ],
)
def test_environments_that_do_not_fit_are_refused_with_the_fix(name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        simulator_of(name, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("make_mistaken", r"KeyError: 'no such robot' \(counting_env.py:\d+\); expected .*; .*fix the function"),
        ("make_demanding", r"TypeError: make_demanding\(\) missing .*'robot'"),
        ("make_stuck", r"ZeroDivisionError: no floor \(counting_env.py:\d+\)"),
    ],
)
def test_an_exception_in_a_users_function_is_reported_with_its_line(make: str, message: str) -> None:
    with pytest.raises(SimulatorError, match=f"counting_env:{make} cannot be created and reset: {message}"):
        simulator_of(f"counting_env:{make}", 2)


def test_an_environment_that_never_returns_terminated_is_refused() -> None:
    simulator = simulator_of("counting_env:make_unfinished", 2)
    simulator.reset()
    with pytest.raises(
        SettingError, match=r"'done' and 'truncated' without 'terminated'; expected .*add 'terminated' to its done_spec"
    ):
        simulator.step(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("make_self_resetting", r"resets itself \(AutoResetEnv\), which overwrites the last .*with auto_reset=False"),
        ("make_self_resetting_kept", r"resets itself \(AutoReset(Env|Transform)\).*with auto_reset=False"),
        ("make_self_resetting_workers", r"resets itself \(AutoResetTransform in SerialEnv\).*without AutoReset"),
        ("make_next_step", r"resets itself \(AsyncVectorEnv with .*NEXT_STEP\).*AutoresetMode.DISABLED"),
    ],
)
def test_environments_that_reset_themselves_and_lose_their_last_observation_are_refused(
    make: str, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        simulator_of(f"counting_env:{make}", 2)


@pytest.mark.parametrize("frame_skip", [1, 2, 3])
@pytest.mark.parametrize("make", ["make_same_step", "make_disabled"])
def test_a_gymnasium_vector_returns_true_last_observations(make: str, frame_skip: int) -> None:
    simulator = simulator_of(f"counting_env:{make}", 2, frame_skip=frame_skip)
    arrivals = [simulator.reset(), *(simulator.step(torch.tensor([[0.2], [1.0]])) for _ in range(60))]
    simulator.close()
    uneven = [arrival for arrival in arrivals if arrival.is_last.sum() == 1]
    assert len(uneven) > 3  # one row ends, perhaps in the middle of a repeat, and the other continues
    for arrival in arrivals:
        assert arrival.acting_obs is not None
        last, fresh = (obs["observation"][arrival.is_terminal, 1].abs() for obs in (arrival.obs, arrival.acting_obs))
        assert (last > 0.2).all()  # the task ends beyond 0.2 and starts within 0.01; SAME_STEP continues from there
        assert (fresh <= (0.01 if make == "make_disabled" or frame_skip == 1 else 0.19)).all()
        assert torch.equal(
            arrival.acting_obs["observation"][~arrival.is_last], arrival.obs["observation"][~arrival.is_last]
        )
    for before, after in itertools.pairwise(arrivals):
        assert torch.equal(after.is_first, before.is_last)
        assert (after.reward <= frame_skip).all() and (after.reward >= 0).all()


def test_a_vector_whose_rows_can_be_reset_at_any_time_accepts_a_horizon() -> None:
    simulator = simulator_of("counting_env:make_disabled", 2, horizon=2)
    arrivals = play(simulator, 4)
    simulator.close()
    assert column(arrivals, "is_last", 0) == column(arrivals, "is_last", 1) == [0, 0, 1, 0, 1]
    with pytest.raises(
        SettingError, match=r"env.horizon=2 .*SAME_STEP mode, which cannot reset.*AutoresetMode.DISABLED"
    ):
        simulator_of("counting_env:make_same_step", 2, horizon=2)


def test_a_diverged_row_that_cannot_be_reset_becomes_zeros_and_its_episode_continues() -> None:
    simulator = simulator_of("counting_env:make_spoiled", 2)
    arrivals = play(simulator, 4)
    simulator.close()
    assert column(arrivals, "reward", 0) == [0, 1, 1, 0, 1]
    assert column(arrivals, "is_first", 0) == [1, 0, 0, 1, 1]
    assert column(arrivals, "is_last", 0) == [0, 0, 0, 1, 0]
    assert column(arrivals, "is_first", 1) == [1, 0, 0, 0, 0]
    assert simulator.num_diverged == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            settings_for("HalfCheetah-v5", 8),
            r"env.name=HalfCheetah-v5 names no wrapper .*; expected PREFIX:ID.*; set env.name",
        ),
        (settings_for("gym:Pendlum-v1", 8), r"gym:Pendlum-v1 is not registered; .*set env.name=gym:Pendulum-v1"),
        (settings_for("dm_control:walker/wlak", 8), r"is not registered; .*set env.name=dm_control:walker/walk"),
        (settings_for("gym:Pendulum-v1", None), r"env.num_envs=null .*set env.num_envs=8"),
        (
            settings_for("gym:Pendulum-v1", 8, task="run"),
            r"env.task=run .*; expected an empty env.task; set env.task=''",
        ),
        (settings_for("gym:Pendulum-v1", 8, reward_per_second=True), r"env.reward_per_second=true .*set env.reward_p"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(settings: Settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_env(settings)


def test_gymnasium_through_torchrl_is_gymnasium() -> None:
    simulator = simulator_of("gym:Pendulum-v1", 2, seed=3)
    bare = [gymnasium.make("Pendulum-v1") for _ in range(2)]
    for index, env in enumerate(bare):
        env.reset(seed=environment_seed(3, index) >> 1)
        env.reset()  # the adapter reads a first observation before reset() is called
    expected = torch.stack([torch.as_tensor(env.reset()[0]) for env in bare])
    arrival = simulator.reset()
    assert torch.equal(arrival.obs["observation"], expected)
    generator = torch.Generator().manual_seed(0)
    for tick in range(1, 203):
        action = torch.rand(2, 1, generator=generator) * 2 - 1
        arrival = simulator.step(action)
        steps = [env.step((2 * push).numpy()) for env, push in zip(bare, action, strict=True)]
        assert_rows(arrival, torch.stack([torch.as_tensor(s[0]) for s in steps]), [float(s[1]) for s in steps])
        assert arrival.is_last.tolist() == [tick == 200] * 2
        assert not arrival.is_terminal.any()
        if tick == 200:
            fresh = torch.stack([torch.as_tensor(env.reset()[0]) for env in bare])
            assert arrival.acting_obs is not None
            assert torch.equal(arrival.acting_obs["observation"], fresh)


def assert_rows(arrival: Arrival, obs: Tensor, reward: list[float]) -> None:
    assert torch.allclose(arrival.obs["observation"], obs, rtol=0, atol=1e-6)
    assert torch.allclose(arrival.reward, torch.tensor(reward), rtol=0, atol=1e-5)


def test_the_end_of_a_suite_task_is_a_time_out() -> None:
    simulator = simulator_of("dm_control:cartpole/balance", 2, frame_skip=50)
    assert {name: entry.shape for name, entry in simulator.spec.obs.items()} == {"position": (3,), "velocity": (2,)}
    arrivals = play(simulator, 21)  # 1000 frames
    assert column(arrivals, "is_last", 1) == [0] * 20 + [1, 0]
    assert not any(column(arrivals, "is_terminal", 1))
    assert 0 < arrivals[5].reward[0].item() <= 50


def test_a_seed_reproduces_the_stream_and_environments_differ() -> None:
    streams = [play(simulator_of("gym:Pendulum-v1", 2, seed=seed), 3)[-1].obs["observation"] for seed in (5, 5, 6)]
    assert torch.equal(streams[0], streams[1])
    assert not torch.equal(streams[0], streams[2])
    assert not torch.equal(streams[0][0], streams[0][1])


def test_closing_twice_is_no_error() -> None:
    simulator = simulator_of("gym:Pendulum-v1", 2)
    simulator.reset()
    simulator.close()
    simulator.close()


def rows_with(*lows: torch.Tensor) -> list[EnvRows]:
    """Return environments, each with a batch of rows, whose actions lie between these numbers and their negatives."""
    return [cast(EnvRows, SimpleNamespace(bounds=lambda low=low: (low, -low))) for low in lows]


@pytest.mark.parametrize("split", [1, 3], ids=["copies", "one batch"])
def test_environments_with_different_action_bounds_are_refused_by_name(split: int) -> None:
    low = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -2.0]])
    with pytest.raises(SettingError, match=r"environment 0 lie in \[-1.0, -1.0\] .*environment 2 in \[-1.0, -2.0\]"):
        common_bounds(rows_with(*low.split(split)))
    assert [bound.tolist() for bound in common_bounds(rows_with(*low[:2].split(split)))] == [[-1, -1], [1, 1]]
