"""Backend `example`: points on a line. A force must bring each of them to rest in the middle."""

from pathlib import Path

import torch
from torch import Tensor

from collector_proc.simulators.base import Arrival
from shared.config import Settings
from shared.stream import ObsSpec, StreamSpec

FRAME_S, EPISODE_STEPS, EDGE = 0.1, 50, 2.0


class PointSimulator:
    """env.num_envs points that show position and speed. A point that leaves [-2, 2] ends its episode."""

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        self.spec = StreamSpec(settings.env.num_envs or 1, {"policy": ObsSpec((2,), "float32")}, action_dim=1)
        self.device, self.frames_per_step, self.num_diverged = device, settings.env.frame_skip, 0
        self.max_age = settings.env.horizon or EPISODE_STEPS
        self.generator = torch.Generator(device).manual_seed(seed)
        self.position, self.speed, self.age = torch.zeros(3, self.spec.num_envs, device=device)

    def reset(self) -> Arrival:
        self.ended = torch.ones_like(self.age, dtype=torch.bool)
        return self.step(torch.zeros(self.spec.num_envs, 1, device=self.device))

    def step(self, action: Tensor) -> Arrival:
        first, position, speed, reward = self.ended, self.position, self.speed, torch.zeros_like(self.speed)
        for _ in range(self.frames_per_step):
            speed = speed + FRAME_S * action[:, 0]
            position = position + FRAME_S * speed
            reward = reward + 1 - position.abs() / EDGE
        start = torch.rand(first.shape, generator=self.generator, device=self.device) - 0.5
        # Where the previous arrival was `is_last`, this tick is the reset and the action has no effect.
        self.position, self.speed = torch.where(first, start, position), torch.where(first, 0.0, speed)
        self.age, reward = torch.where(first, 0.0, self.age + 1), torch.where(first, 0.0, reward)
        left = self.position.abs() > EDGE
        self.ended = left | (self.age >= self.max_age)
        obs = {"policy": torch.stack((self.position, self.speed), -1)}
        return Arrival(obs, reward, is_first=first, is_last=self.ended, is_terminal=left)

    def close(self) -> None:
        """There is nothing to free."""
