"""The pendulum, compared with a simulation of one pendulum in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from collector_proc.simulators.pendulum.simulator import (
    FALLEN,
    PendulumSimulator,
    leaning_reward,
    pendulum_frame,
    pendulum_obs,
)
from shared.config import Settings


def simulator_of(
    num_envs: int,
    *,
    seed: int = 0,
    frame_skip: int = 2,
    horizon: int | None = None,
    device: str = "cpu",
    task: str = "swingup",
) -> PendulumSimulator:
    settings = Settings()
    settings.env.backend, settings.env.name, settings.env.task = "pendulum", "pendulum", task
    settings.env.from_pixels, settings.env.num_envs = False, num_envs
    settings.env.frame_skip, settings.env.horizon = frame_skip, horizon
    return PendulumSimulator(settings, seed=seed, device=device)


def scalar_frame(theta: float, speed: float, action: float) -> tuple[float, float, float]:
    """Make one frame of gym's Pendulum-v1 with floats: g = 10, m = 1, l = 1, dt = 0.05, speed within 8."""
    speed = speed + (3 * 10 / 2 * math.sin(theta) + 3 * 2 * action) * 0.05
    speed = max(-8.0, min(8.0, speed))
    theta = theta + speed * 0.05
    return theta, speed, (1 + math.cos(theta)) / 2


def swing_up(obs: Tensor) -> Tensor:
    """Return actions (E, 1) for obs (E, 3): add energy until the pendulum is near the top, then hold it there."""
    cosine, sine, speed = obs[:, 0], obs[:, 1], obs[:, 2] * 8
    missing = 15 - (speed**2 / 2 + 15 * cosine)  # at rest on top the energy is 15; without torque it is constant
    pump = torch.sign(speed + 1e-6) * torch.sign(missing)
    hold = -(8 * torch.atan2(sine, cosine) + 2 * speed)
    return torch.where(cosine > 0.9, hold, pump).clamp(-1, 1)[:, None]


def episode_return(simulator: PendulumSimulator, policy: str) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    arrival = simulator.reset()
    total = torch.zeros(simulator.spec.num_envs)
    for _ in range(100):
        uniform = torch.rand(simulator.spec.num_envs, 1, generator=generator) * 2 - 1
        arrival = simulator.step(swing_up(arrival.obs["policy"]) if policy == "energy" else uniform)
        total += arrival.reward
    assert arrival.is_last.all()
    return total


def test_one_frame_with_full_torque_equals_the_values_calculated_by_hand() -> None:
    state, reward = pendulum_frame(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(state, torch.tensor([[0.015, 0.3]]), rtol=0, atol=1e-7)  # 3 * 2 * 0.05; 0.3 * 0.05
    torch.testing.assert_close(reward, torch.tensor([(1 + math.cos(0.015)) / 2]), rtol=0, atol=1e-7)


def test_frames_equal_those_of_a_simulation_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(16, 2, generator=generator, dtype=torch.float64) * torch.tensor([6.0, 16.0]) - torch.tensor(
        [3.0, 8.0]
    )
    scalar = [tuple(row) for row in state.tolist()]
    for _ in range(50):
        action = torch.rand(16, 1, generator=generator, dtype=torch.float64) * 2 - 1
        state, reward = pendulum_frame(state, action)
        stepped = [scalar_frame(theta, speed, a) for (theta, speed), (a,) in zip(scalar, action.tolist(), strict=True)]
        scalar = [(theta, speed) for theta, speed, _ in stepped]
        torch.testing.assert_close(state, torch.tensor(scalar, dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(
            reward, torch.tensor([r for *_, r in stepped], dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_the_speed_never_exceeds_eight() -> None:
    state, _ = pendulum_frame(torch.tensor([[math.pi / 2, 7.9], [-math.pi / 2, -7.9]]), torch.tensor([[1.0], [-1.0]]))
    torch.testing.assert_close(state[:, 1], torch.tensor([8.0, -8.0]), rtol=0, atol=0)


def test_an_observation_is_cosine_sine_and_speed_over_eight() -> None:
    obs = pendulum_obs(torch.tensor([[math.pi / 2, 4.0]]))
    torch.testing.assert_close(obs, torch.tensor([[0.0, 1.0, 0.5]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("frame_skip", "horizon", "steps"), [(2, None, 100), (3, None, 67), (2, 5, 5), (2, 120, 120)])
def test_the_flags_of_arrivals_follow_the_interface(frame_skip: int, horizon: int | None, steps: int) -> None:
    simulator = simulator_of(3, frame_skip=frame_skip, horizon=horizon)
    arrival = simulator.reset()
    for _ in range(2):
        assert arrival.is_first.all() and not arrival.is_last.any() and (arrival.reward == 0).all()
        for step in range(1, steps + 1):
            arrival = simulator.step(torch.zeros(3, 1))
            assert not arrival.is_first.any() and (arrival.reward != 0).all()
            assert arrival.is_last.tolist() == [step == steps] * 3, step
            assert not arrival.is_terminal.any()
        arrival = simulator.step(torch.ones(3, 1))


@pytest.mark.parametrize("frame_skip", [1, 2, 3])
def test_rewards_of_an_episode_are_the_sum_over_its_200_frames(frame_skip: int) -> None:
    simulator = simulator_of(2, frame_skip=frame_skip)
    arrival = simulator.reset()
    obs = arrival.obs["policy"].double()
    state = torch.stack((torch.atan2(obs[:, 1], obs[:, 0]), obs[:, 2] * 8), 1)
    expected, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for _ in range(200):
        state, reward = pendulum_frame(state, torch.full((2, 1), 0.5, dtype=torch.float64))
        expected += reward
    for _ in range(-(-200 // frame_skip)):
        arrival = simulator.step(torch.full((2, 1), 0.5))
        total += arrival.reward
    assert arrival.is_last.all()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=0.05)


def test_an_action_after_the_end_of_an_episode_has_no_effect() -> None:
    resets = []
    for action in (1.0, -1.0):
        simulator = simulator_of(4, horizon=2)
        simulator.reset()
        simulator.step(torch.zeros(4, 1))
        assert simulator.step(torch.zeros(4, 1)).is_last.all()
        resets.append(simulator.step(torch.full((4, 1), action)).obs["policy"])
    torch.testing.assert_close(resets[0], resets[1], rtol=0, atol=0)


def test_equal_seeds_give_equal_runs_and_different_seeds_different_ones() -> None:
    runs = []
    for seed in (5, 5, 6):
        simulator = simulator_of(4, seed=seed, horizon=3)
        arrivals = [simulator.reset(), *(simulator.step(torch.full((4, 1), 0.3)) for _ in range(9))]
        runs.append(torch.stack([arrival.obs["policy"] for arrival in arrivals]))
    assert torch.equal(runs[0], runs[1])
    assert not (runs[0] == runs[2]).all(dim=-1).any()
    assert not torch.equal(runs[0][0], runs[0][4])  # the second episode has another start


def test_start_angles_cover_the_circle_and_start_speeds_are_at_most_one() -> None:
    obs = simulator_of(4096).reset().obs["policy"]
    quadrants = torch.stack([(obs[:, 0] > 0) == c for c in (True, False)]).float().mean(1)
    torch.testing.assert_close(quadrants, torch.tensor([0.5, 0.5]), rtol=0, atol=0.05)
    assert abs(float(obs[:, 1].mean())) < 0.05
    speed = obs[:, 2] * 8
    assert -1 <= float(speed.min()) < -0.99 and 0.99 < float(speed.max()) <= 1


def test_returns_of_random_and_good_actions_are_as_documented() -> None:
    random = episode_return(simulator_of(512), "random")
    assert 58 < float(random.mean()) < 70 and 34 < float(random.std()) < 50  # 64 +- 42
    energy = episode_return(simulator_of(512), "energy")
    assert float(energy.mean()) > 150 and float(energy.max()) <= 200


@pytest.mark.gpu
def test_a_tick_on_cuda_never_waits_for_the_device() -> None:
    simulator = simulator_of(64, device="cuda:0")
    action = torch.zeros(64, 1, device="cuda:0")
    arrival = simulator.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(205):
            arrival = simulator.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert arrival.reward.is_cuda


def test_a_fall_terminates_the_episode_and_leaning_is_rewarded_until_then() -> None:
    simulator = simulator_of(64, task="balance")
    arrival, fell = simulator.reset(), torch.zeros(64)
    for _ in range(30):  # with full torque to one side, every pendulum falls and begins a new episode
        arrival = simulator.step(torch.ones(64, 1))
        theta = torch.atan2(arrival.obs["policy"][:, 1], arrival.obs["policy"][:, 0])
        assert torch.equal(arrival.is_terminal, theta.abs() > FALLEN)
        assert torch.equal(arrival.is_last, arrival.is_terminal)
        assert (theta[arrival.is_first].abs() <= 0.1).all() and (arrival.reward[arrival.is_first] == 0).all()
        moving = ~arrival.is_first
        last_frame = 0.5 + 0.5 * (theta.abs() / FALLEN).clamp(max=1.0)  # an agent step sums two frames
        first_frame = arrival.reward - last_frame
        assert (first_frame[moving] >= 0.5 - 1e-5).all() and (first_frame[moving] <= 1 + 1e-5).all()
        fell += arrival.is_terminal
    assert (fell >= 2).all()


def test_with_a_balancing_controller_the_episode_ends_by_time_out() -> None:
    simulator = simulator_of(16, seed=1, task="balance")
    arrival, total = simulator.reset(), torch.zeros(16)
    for _ in range(100):
        _, sine, speed = arrival.obs["policy"].unbind(-1)
        action = (
            -15.0 * sine - 20.0 * sine - 8.0 * 8.0 * speed
        ) / 6.0  # compensates gravity, and reduces angle and speed
        arrival = simulator.step(action.clamp(-1, 1)[:, None])
        assert not arrival.is_terminal.any()
        total += arrival.reward
    assert arrival.is_last.all()
    assert ((total > 100) & (total < 105)).all(), total  # the reward is half as high upright as at the limit


def test_balance_rewards_half_if_upright_and_one_at_the_angle_that_ends_it() -> None:
    angles = torch.tensor([0.0, 0.4, -0.4, -0.8, 1.2])
    reward = leaning_reward(torch.stack((angles, torch.zeros(5)), 1))
    torch.testing.assert_close(reward, torch.tensor([0.5, 0.75, 0.75, 1.0, 1.0]), rtol=0, atol=1e-6)
