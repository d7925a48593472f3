"""Backend `pendulum`: a pendulum that a torque moves, written in torch. It runs on any device.

The observation "policy" is (cos theta, sin theta, theta_dot / 8). Episodes time out after 200 frames. The tasks are:

swingup   The start angle is arbitrary. The reward of a frame is (1 + cos theta) / 2, so a return is at most 200; random
          actions earn 64 +- 42. Episodes never terminate.
balance   The pendulum starts upright. The reward of a frame is 0.5 if it is upright, and more the further it leans. An
          agent step that ends beyond 0.8 rad (46 degrees) terminates the episode. Standing upright earns 100, and an
          immediate fall about 10. A model that does not predict the end of episodes learns to fall, because leaning has
          the higher rewards.

Source: the dynamics of gym's Pendulum-v1, with rewards in [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from collector_proc.simulators.base import ActionRange, Arrival
from shared.stream import ObsSpec, StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from shared.config import Settings

GRAVITY, MASS, LENGTH, FRAME_S = 10.0, 1.0, 1.0, 0.05  # m/s^2, kg, m, s
MAX_TORQUE, MAX_SPEED = 2.0, 8.0  # N m, rad/s
EPISODE_FRAMES = 200
FALLEN = 0.8  # rad: beyond it "balance" terminates
START_RANGES = {"swingup": (math.pi, 1.0), "balance": (0.1, 0.1)}  # largest start angle (rad) and speed (rad/s)
TASKS = tuple(START_RANGES)


def pendulum_frame(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state after one simulator frame of 0.05 s, and the reward of "swingup" for it.

    Shapes: state (E, 2) and action (E, 1) in [-1, 1]; the reward is (E,).
    Units: state is theta (rad, 0 is upright) and theta_dot (rad/s).
    """
    theta, speed = state.unbind(-1)
    torque = MAX_TORQUE * action.squeeze(-1)
    acceleration = 3 * GRAVITY / (2 * LENGTH) * theta.sin() + 3 / (MASS * LENGTH**2) * torque
    speed = (speed + acceleration * FRAME_S).clamp(-MAX_SPEED, MAX_SPEED)
    theta = theta + speed * FRAME_S
    state = speed.new_empty(*speed.shape, 2)
    state[..., 0], state[..., 1] = theta, speed
    return state, (1 + theta.cos()) / 2


def leaning_reward(state: Tensor) -> Tensor:
    """Return the reward (E,) of "balance" for one frame: 0.5 if upright, up to 1 at the angle that ends the episode."""
    return 0.5 + 0.5 * (state[:, 0].abs() / FALLEN).clamp(max=1.0)


def pendulum_obs(state: Tensor) -> Tensor:
    """Return the observation (E, 3): cos theta, sin theta, theta_dot / 8."""
    import torch

    theta, speed = state.unbind(-1)
    return torch.stack((theta.cos(), theta.sin(), speed / MAX_SPEED), -1)


class PendulumSimulator:
    """env.num_envs pendulums. One random generator on the device draws every start state, so the seed fixes the run."""

    num_diverged = 0
    action_range = ActionRange((-MAX_TORQUE,), (MAX_TORQUE,))  # N m

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        """crash_dir has no effect: the state of a pendulum is always finite."""
        import torch

        num_envs = settings.env.num_envs
        assert num_envs is not None, "check_env refuses env.num_envs=null"
        self.spec = StreamSpec(num_envs, {"policy": ObsSpec((3,), "float32")}, 1)
        self.device, self.frames_per_step = device, settings.env.frame_skip
        horizon = settings.env.horizon
        self._frame_limit = EPISODE_FRAMES if horizon is None else horizon * self.frames_per_step
        self._generator = torch.Generator(device).manual_seed(seed)
        self._state = torch.zeros(num_envs, 2, device=device)
        self._frames = torch.zeros(num_envs, dtype=torch.int64, device=device)  # of the current episode
        self._over = torch.ones(num_envs, dtype=torch.bool, device=device)
        self._start_range = torch.tensor(START_RANGES[settings.env.task], device=device)
        self._balance = settings.env.task == "balance"

    @property
    def state(self) -> Tensor:
        """The angle (rad, 0 is upright) and the speed (rad/s) of every pendulum, (E, 2)."""
        return self._state

    def reset(self) -> Arrival:
        """Begin a new episode in every environment."""
        import torch

        self._over = torch.ones_like(self._over)
        return self.step(torch.zeros(self.spec.num_envs, 1, device=self.device))

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step in every environment. Shapes: action (E, 1) in [-1, 1]."""
        import torch

        assert action.shape == (self.spec.num_envs, 1), action.shape
        first = self._over
        with torch.no_grad():
            state, frames, reward = self._repeat(action)
            self._state = torch.where(first[:, None], self._draw_start(), state)
            self._frames = torch.where(first, 0, frames)
            fallen = self._fallen(self._state)
            self._over = fallen | (self._frames >= self._frame_limit)
            obs, reward = pendulum_obs(self._state), torch.where(first, 0.0, reward)
        return Arrival({"policy": obs}, reward, is_first=first, is_last=self._over, is_terminal=fallen)

    def close(self) -> None:
        """There is nothing to free."""

    def _repeat(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make frame_skip frames, but none after the episode's last. Return state, frames and summed reward."""
        import torch

        state, frames, total = self._state, self._frames, torch.zeros_like(action[:, 0])
        for _ in range(self.frames_per_step):
            alive = frames < self._frame_limit
            moved, reward = pendulum_frame(state, action)
            reward = leaning_reward(moved) if self._balance else reward
            state = torch.where(alive[:, None], moved, state)
            total = torch.where(alive, total + reward, total)
            frames = frames + alive
        return state, frames, total

    def _fallen(self, state: Tensor) -> Tensor:
        """Return (E,) bool: whether the task has ended. That never happens in "swingup"."""
        return (state[:, 0].abs() > FALLEN) & self._balance

    def _draw_start(self) -> Tensor:
        """Return start states (E, 2), uniform in the task's range."""
        import torch

        noise = torch.rand(self.spec.num_envs, 2, generator=self._generator, device=self.device)
        return (noise * 2 - 1) * self._start_range
