"""The mjlab backend on the real simulator: cart-poles on the CPU.

The first run compiles Warp's kernels (about 40 s).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mjlab", reason="the extra `mjlab` is not installed")

from collector_proc.simulators.base import Arrival
from collector_proc.simulators.mjlab.simulator import MjlabSimulator, _cut_episodes
from collector_proc.simulators.registry import build_simulator, check_env
from shared.config import Settings
from shared.errors import SettingError

NUM_ENVS = 64
CART, COS, SIN = 0, 1, 2  # indices of the five observed numbers; the last two are the speeds of cart and pole


def settings_for(**env: object) -> Settings:
    settings = Settings()
    defaults = {"backend": "mjlab", "name": "Mjlab-Cartpole-Balance", "task": "", "num_envs": NUM_ENVS}
    defaults |= {"from_pixels": False, "frame_skip": 1, "randomize_start": False}
    for key, value in {**defaults, **env}.items():
        assert hasattr(settings.env, key), key
        setattr(settings.env, key, value)
    return settings


def simulator_of(*, seed: int = 0, **env: object) -> MjlabSimulator:
    simulator = build_simulator(settings_for(**env), seed=seed, device="cpu")
    assert isinstance(simulator, MjlabSimulator)
    return simulator


def actions(num_ticks: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(NUM_ENVS, 1, generator=generator) * 2 - 1 for _ in range(num_ticks)]


def play(simulator: MjlabSimulator, num_ticks: int) -> list[Arrival]:
    return [simulator.reset(), *(simulator.step(action) for action in actions(num_ticks))]


def vectors(arrivals: list[Arrival]) -> Tensor:
    """Return the actor's observations (T, E, 5)."""
    return torch.stack([arrival.obs["actor"] for arrival in arrivals])


def flags(arrivals: list[Arrival], name: str) -> Tensor:
    """Return one flag of all arrivals (T, E)."""
    return torch.stack([getattr(arrival, name) for arrival in arrivals])


def acting(arrival: Arrival) -> Tensor:
    assert arrival.acting_obs is not None
    return arrival.acting_obs["actor"]


@pytest.fixture(scope="module")
def long() -> list[Arrival]:
    """Twelve ticks of episodes that do not end."""
    return play(simulator_of(), 12)


def test_the_task_streams_its_actor_group_and_one_action_per_driven_joint(long: list[Arrival]) -> None:
    assert long[0].obs["actor"].shape == (NUM_ENVS, 5)
    assert long[0].is_first.all()
    assert not flags(long[1:], "is_first").any()
    assert not flags(long, "is_last").any()
    assert long[0].reward.abs().max() == 0


def test_the_row_of_an_ended_episode_holds_its_true_last_observation(long: list[Arrival]) -> None:
    cut = play(simulator_of(horizon=6), 8)
    assert torch.equal(flags(cut, "is_last").all(1), torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 0], dtype=torch.bool))
    assert not flags(cut, "is_terminal").any()  # a time-out
    # With the same seed and actions, an episode that continues passes through the same state.
    assert torch.equal(vectors(cut)[:7], vectors(long)[:7])
    assert torch.equal(flags(cut, "reward")[:7], flags(long, "reward")[:7])
    # The start lies within the task's start range; a cart-pole after six ticks of random actions does not.
    start = acting(cut[6])
    assert float(start[:, CART].abs().max()) <= 0.1 + 1e-6
    assert float(start[:, 3:].abs().max()) <= 0.01 + 1e-6
    assert float(vectors(cut)[6][:, 3:].abs().max()) > 0.5


def test_the_row_after_an_ended_episode_is_first_and_keeps_its_reward() -> None:
    arrivals = play(simulator_of(horizon=6), 8)
    following = arrivals[7]
    assert following.is_first.all()
    assert (following.reward > 0).all()
    moved = following.obs["actor"] - acting(arrivals[6])
    assert 0 < float(moved[:, CART].abs().max()) < 0.05  # one tick away from the start that was acted on
    assert not arrivals[8].is_first.any()


def test_an_arrival_does_not_change_later(long: list[Arrival]) -> None:
    simulator = simulator_of(horizon=4)
    arrivals, copies = [], []
    for action in [None, *actions(6)]:
        arrival = simulator.reset() if action is None else simulator.step(action)
        arrivals.append(arrival)
        copies.append([entry.clone() for entry in _entries(arrival)])
    for arrival, copy in zip(arrivals, copies, strict=True):
        assert all(torch.equal(entry, kept) for entry, kept in zip(_entries(arrival), copy, strict=True))
    assert len({entry.data_ptr() for arrival in arrivals for entry in _entries(arrival)}) == 6 * len(arrivals)


def _entries(arrival: Arrival) -> list[Tensor]:
    rows = [arrival.obs["actor"], acting(arrival), arrival.reward]
    return [*rows, arrival.is_first, arrival.is_last, arrival.is_terminal]


def test_a_seed_reproduces_the_stream_and_environments_differ() -> None:
    one, same, other = (play(simulator_of(seed=seed, horizon=5), 12) for seed in (3, 3, 4))
    assert torch.equal(vectors(one), vectors(same))
    assert torch.equal(flags(one, "reward"), flags(same, "reward"))
    assert not torch.equal(vectors(one), vectors(other))
    starts = vectors(one)[0, :, CART]
    assert len(set(starts.tolist())) == NUM_ENVS


def test_first_training_episodes_end_at_different_ticks_and_evaluation_ones_are_whole() -> None:
    simulator = simulator_of(horizon=20, randomize_start=True)  # collector.eval_envs is 1
    last = flags(play(simulator, 20), "is_last")
    assert last[:, -1].nonzero().flatten().tolist() == [20]
    first_ends = last[:, :-1].int().argmax(0)
    assert len(set(first_ends.tolist())) > 10
    assert int(first_ends.min()) >= 1


def test_an_environment_that_diverges_is_recorded_as_zeros_and_reset() -> None:
    simulator = simulator_of()
    simulator.reset()
    env: Any = simulator._env
    env.sim.data.qpos[3] = torch.nan
    arrival, following = (simulator.step(action) for action in actions(2))
    assert torch.equal(arrival.is_last, torch.arange(NUM_ENVS) == 3)
    assert arrival.is_first[3]
    assert not arrival.is_terminal.any()
    assert arrival.obs["actor"][3].abs().sum() + arrival.reward[3].abs() == 0
    assert 0.9 < float(acting(arrival)[3, COS]) <= 1  # the new episode
    assert following.obs["actor"].isfinite().all()
    assert torch.equal(following.is_first, torch.arange(NUM_ENVS) == 3)
    assert not following.is_last.any()
    assert simulator.num_diverged == 1


def test_actions_reach_the_task_times_the_scale() -> None:
    simulator = simulator_of(action_scale=3.0)
    simulator.reset()
    action = torch.linspace(-1, 1, NUM_ENVS).unsqueeze(1)
    simulator.step(action)
    env: Any = simulator._env
    assert torch.allclose(env.action_manager.action, 3 * action, rtol=0, atol=1e-6)


def test_rewards_per_second_are_divided_by_the_length_of_a_tick(long: list[Arrival]) -> None:
    arrivals = play(simulator_of(reward_per_second=True), 3)
    assert torch.allclose(flags(arrivals, "reward"), 20 * flags(long, "reward")[:4], rtol=1e-5, atol=0)


def test_a_horizon_without_a_time_out_is_refused() -> None:
    cfg = SimpleNamespace(terminations={"fell": SimpleNamespace(time_out=False)})
    with pytest.raises(SettingError, match=r"env.horizon=9 has no effect, .*\['fell'\].*set env.horizon=null"):
        _cut_episodes(cfg, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            settings_for(name="Mjlab-Cartpole-Ballance"),
            r"is not a task of mjlab; .*set env.name=Mjlab-Cartpole-Balance",
        ),
        (settings_for(frame_skip=2), r"env.frame_skip=2 with env.backend=mjlab, .*decimation.*set env.frame_skip=1"),
        (settings_for(num_envs=None), r"env.num_envs=null .*set env.num_envs=8"),
        (settings_for(task="run"), r"env.task=run .*; expected an empty env.task; set env.task=''"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(settings: Settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_env(settings)


def test_groups_the_task_does_not_have_are_refused() -> None:
    with pytest.raises(
        SettingError, match=r"names 'aktor', .*expected one of actor, critic; set env.obs_groups=\[actor\]"
    ):
        simulator_of(obs_groups=["aktor"])


@pytest.mark.gpu
def test_a_stream_other_than_the_default_one_gives_the_same_rows() -> None:
    device = torch.device("cuda", 0)

    def streamed(stream: torch.cuda.Stream) -> Tensor:
        simulator = build_simulator(settings_for(horizon=6), seed=0, device="cuda:0")
        with torch.cuda.stream(stream):
            rows = [simulator.reset().obs["actor"].clone()]
            for action in actions(20):
                rows.append(simulator.step(action.to(device)).obs["actor"].clone())
        torch.cuda.synchronize(device)
        simulator.close()
        return torch.stack(rows).cpu()

    default = streamed(torch.cuda.default_stream(device))
    torch.testing.assert_close(streamed(torch.cuda.Stream(device)), default, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_camera_arrives_as_64x64_bytes() -> None:
    simulator = simulator_of(name="Mjlab-Lift-Cube-Yam-Rgb", num_envs=2, from_pixels=True, obs_groups=["camera"])
    pixels = simulator.reset().obs["pixels"]
    assert pixels.shape == (2, 64, 64, 3)
    assert pixels.dtype == torch.uint8
    assert len(pixels.unique()) > 10  # a picture, not a constant
