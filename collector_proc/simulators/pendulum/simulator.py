"""Backend `pendulum`: a torque pendulum in torch, any number of environments at once on any device; no dependency.

Observation "policy": (cos theta, sin theta, theta_dot / 8). Episodes are cut after 200 frames. Two tasks:

swingup   any start angle, reward (1 + cos theta) / 2 a frame, so at most 200; never terminates; random play 64 +- 42
balance   starts upright; a frame pays 0.5 upright and more the further it leans, but an agent step that ends beyond
          0.8 rad (46 degrees) terminates the episode: standing pays 100, falling at once about 10, and whoever ignores
          that episodes end falls for the better pay

Source: the classic gym Pendulum-v1 dynamics, with rewards that lie in [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from collector_proc.simulators.base import Arrival
from shared.stream import ObsSpec, StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from shared.config import Settings

GRAVITY, MASS, LENGTH, FRAME_S = 10.0, 1.0, 1.0, 0.05  # m/s^2, kg, m, s
MAX_TORQUE, MAX_SPEED = 2.0, 8.0  # N m, rad/s
EPISODE_FRAMES = 200
FALLEN = 0.8  # rad: beyond it "balance" terminates
START_RANGES = {"swingup": (math.pi, 1.0), "balance": (0.1, 0.1)}  # half widths: rad, rad/s
TASKS = tuple(START_RANGES)


def pendulum_frame(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The next state and its reward: one simulator frame of 0.05 s.

    Shapes: state (E, 2) of theta (rad, 0 is upright) and theta_dot (rad/s), action (E, 1) in [-1, 1]; reward (E,).
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
    """(E,): what a frame of "balance" pays, from 0.5 upright to 1 at the angle where the task ends."""
    return 0.5 + 0.5 * (state[:, 0].abs() / FALLEN).clamp(max=1.0)


def pendulum_obs(state: Tensor) -> Tensor:
    """(E, 3): cos theta, sin theta, theta_dot / 8."""
    import torch

    theta, speed = state.unbind(-1)
    return torch.stack((theta.cos(), theta.sin(), speed / MAX_SPEED), -1)


class PendulumSimulator:
    """env.num_envs pendulums; one generator on the device draws every start state, so a seed fixes the whole run."""

    num_diverged = 0

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        """crash_dir has no effect: the state of a pendulum is always finite."""
        import torch

        num_envs = settings.env.num_envs
        assert num_envs is not None, "check_env demands env.num_envs"
        self.spec = StreamSpec(num_envs, {"policy": ObsSpec((3,), "float32")}, 1)
        self.device, self.frames_per_step = device, settings.env.frame_skip
        horizon = settings.env.horizon
        self._frame_limit = EPISODE_FRAMES if horizon is None else horizon * self.frames_per_step
        self._generator = torch.Generator(device).manual_seed(seed)
        self._state = torch.zeros(num_envs, 2, device=device)
        self._frames = torch.zeros(num_envs, dtype=torch.int64, device=device)  # of the running episode
        self._over = torch.ones(num_envs, dtype=torch.bool, device=device)
        self._start_range = torch.tensor(START_RANGES[settings.env.task], device=device)
        self._balance = settings.env.task == "balance"

    def reset(self) -> Arrival:
        """Start every environment anew."""
        import torch

        self._over = torch.ones_like(self._over)
        return self.step(torch.zeros(self.spec.num_envs, 1, device=self.device))

    def step(self, action: Tensor) -> Arrival:
        """One agent step of every environment. action: (E, 1) in [-1, 1]."""
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
        """Nothing to free."""

    def _repeat(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State, frames and summed reward after up to frame_skip frames; none past the episode's last."""
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
        """(E,) bool: where the task has ended; swing-up never does."""
        return (state[:, 0].abs() > FALLEN) & self._balance

    def _draw_start(self) -> Tensor:
        """(E, 2): uniform within the task's half widths."""
        import torch

        noise = torch.rand(self.spec.num_envs, 2, generator=self._generator, device=self.device)
        return (noise * 2 - 1) * self._start_range
