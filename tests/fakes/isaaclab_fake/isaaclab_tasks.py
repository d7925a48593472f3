"""Tier A's tasks: environments whose observations say which environment, episode and age they are of.

policy (E, 4): environment, episode, age in steps, last action. Even environments terminate at age 5 + env, odd ones are cut
at `max_episode_length` - 10 by default. The reward of a step is the age it leads to, times step_dt.

Fake-Manager-v0       observation manager; unbounded actions; reset takes env_ids
Fake-Direct-v0        _get_observations hands out a view of the state; reset takes no env_ids
Fake-Bounded-v0       a box of actions [0, 4]
Fake-Groups-v0        groups policy and critic, the latter of two terms
Fake-Camera-v0        policy is an image (100, 100, 3): bytes, or floats whose mean was taken off
Fake-Final-v0         cfg.compute_final_obs, as newer versions have it
Fake-Discrete-v0      nothing we can drive
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch

sys.modules["isaaclab_tasks.utils"] = sys.modules[__name__]
STEP_S = 0.02
ALIVE: list[object] = []


def image(env: FakeEnv, *, data_type: str = "rgb", normalize: bool = True) -> torch.Tensor:
    """A grey of the environment's age, with one black column so that a mean can be taken off."""
    picture = (20 * env.state[:, 2]).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 100, 100, 3)
    picture[:, :, 0] = 0
    if not normalize:
        return picture
    floats = picture.float() / 255
    return floats - floats.mean((1, 2), keepdim=True)


def make_cfg(task: str) -> SimpleNamespace:
    sim = SimpleNamespace(dt=STEP_S / 4, device="cuda:0")
    cfg = SimpleNamespace(task=task, sim=sim, decimation=4, seed=None, episode_length_s=10 * STEP_S)
    cfg.scene = SimpleNamespace(num_envs=4096)
    if task == "Fake-Camera-v0":
        cfg.num_rerenders_on_reset = 0
        term = SimpleNamespace(func=image, params={"data_type": "rgb"})
        cfg.observations = SimpleNamespace(policy=SimpleNamespace(image=term))
    if task == "Fake-Final-v0":
        cfg.compute_final_obs = False
    return cfg


def parse_env_cfg(
    task_name: str, device: str = "cuda:0", num_envs: int | None = None, use_fabric: bool | None = None
) -> SimpleNamespace:
    cfg = make_cfg(task_name)
    cfg.sim.device = device
    cfg.scene.num_envs = num_envs or cfg.scene.num_envs
    return cfg


class FakeEnv(gymnasium.Env):
    """The step order and the buffers of ManagerBasedRLEnv 2.3.2."""

    def __init__(self, cfg: SimpleNamespace, render_mode: str | None = None) -> None:
        if ALIVE:
            raise RuntimeError("Simulation context already exists. Cannot create a new one.")
        ALIVE.append(self)
        self.cfg, self.device, self.num_envs = cfg, cfg.sim.device, cfg.scene.num_envs
        self.step_dt = cfg.sim.dt * cfg.decimation
        torch.manual_seed(cfg.seed)
        self.state = torch.zeros(self.num_envs, 4, device=self.device)  # what a simulator would hold
        self.state[:, 0] = torch.arange(self.num_envs)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.reward_buf = torch.zeros(self.num_envs, device=self.device)
        self.reset_terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.reset_time_outs = torch.zeros_like(self.reset_terminated)
        self.extras: dict = {}
        self.scene = SimpleNamespace(write_data_to_sim=lambda: None)
        self.sim = SimpleNamespace(forward=lambda: None)
        self.num_steps = self.num_resets = 0
        self.single_action_space = self._action_space()
        self.render_mode = render_mode

    @property
    def max_episode_length(self) -> int:
        return math.ceil(self.cfg.episode_length_s / self.step_dt)

    def _action_space(self) -> gymnasium.Space:
        if self.cfg.task == "Fake-Discrete-v0":
            return gymnasium.spaces.Discrete(3)
        low, high = (0.0, 4.0) if self.cfg.task == "Fake-Bounded-v0" else (-np.inf, np.inf)
        return gymnasium.spaces.Box(low, high, (1,))

    def observe(self) -> dict:
        if self.cfg.task == "Fake-Camera-v0":
            params = self.cfg.observations.policy.image.params
            return {"policy": image(self, **params)}
        obs: dict = {"policy": self.state.clone()}
        if self.cfg.task == "Fake-Groups-v0":
            obs["critic"] = {"age": self.state[:, 2:3].clone(), "matrix": self.state.clone().view(-1, 2, 2)}
        return obs

    def reset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, seed: int | None = None, env_ids: torch.Tensor | None = None, options: dict | None = None
    ) -> tuple:
        self.num_resets += 1
        if self.num_resets > 1:
            raise RuntimeError("reset twice")
        self._reset_idx(torch.arange(self.num_envs, device=self.device))
        return self.observe(), self.extras

    def step(self, action: torch.Tensor) -> tuple:
        if not isinstance(action, torch.Tensor):
            raise AttributeError("'ndarray' object has no attribute 'to'")
        if action.shape != (self.num_envs, 1):
            raise ValueError(f"Invalid action shape, expected: 1, received: {action.shape[1]}.")
        self.num_steps += 1
        self._act_up()
        self.state[:, 2] += 1
        self.state[:, 3] = action[:, 0]
        self.episode_length_buf += 1
        age, even = self.state[:, 2], self.state[:, 0] % 2 == 0
        self.reset_terminated[:] = even & (age >= 5 + self.state[:, 0])
        self.reset_time_outs[:] = self.episode_length_buf >= self.max_episode_length
        self.reward_buf[:] = age * self.step_dt  # in place: what was handed out before is overwritten
        done = self.reset_terminated | self.reset_time_outs
        indices = done.nonzero(as_tuple=False).squeeze(-1)
        if getattr(self.cfg, "compute_final_obs", False):
            self.extras["final_obs"] = self.observe()
        if len(indices) > 0:
            self.extras["log"] = {"Episode/age": age[indices].mean()}  # else the old one stays
            self._reset_idx(indices)
        return self.observe(), self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras

    def _reset_idx(self, env_ids: torch.Tensor) -> None:
        self.state[env_ids, 1] += 1
        self.state[env_ids, 2:] = 0
        self.episode_length_buf[env_ids] = 0

    def close(self) -> None:
        while os.environ.get("FAKE_HANG_CLOSE"):
            time.sleep(0.05)

    def _act_up(self) -> None:
        """What the environment variables ask for."""
        tick, _, env = os.environ.get("FAKE_NAN", "").partition(":")
        if tick and self.num_steps == int(tick):
            self.state[int(env), 2] = math.nan
        tick, _, once = os.environ.get("FAKE_CRASH", "").partition(":")
        if tick and self.num_steps == int(tick) and not Path(once).exists():
            Path(once).touch()
            os._exit(0)


class ManagerEnv(FakeEnv):
    def __init__(self, cfg: SimpleNamespace, render_mode: str | None = None) -> None:
        super().__init__(cfg, render_mode)
        self.observation_manager = SimpleNamespace(compute=self.observe)


class DirectEnv(FakeEnv):
    """What it observes is the simulator's own memory."""

    def observe(self) -> dict:
        return {"policy": self.state}

    def _get_observations(self) -> dict:
        return self.observe()

    def reset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, seed: int | None = None, options: dict | None = None
    ) -> tuple:
        return super().reset(seed, options=options)


for _task in ("Manager", "Bounded", "Groups", "Camera", "Final", "Discrete"):
    gymnasium.register(
        id=f"Fake-{_task}-v0", entry_point="isaaclab_tasks:ManagerEnv", disable_env_checker=True, order_enforce=False
    )
gymnasium.register(
    id="Fake-Direct-v0", entry_point="isaaclab_tasks:DirectEnv", disable_env_checker=True, order_enforce=False
)
