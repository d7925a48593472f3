"""The tasks of tier A. Their observations show the environment, the episode and the age that they belong to.

policy (E, 4): environment, episode, age in steps, last action. The reward of a step is its age times step_dt.
Environments with an even number terminate at age 5 + number. The others time out after 10 steps by default: at
`max_episode_length`, or one step earlier in direct tasks.

Fake-Manager-v0       has an observation manager and unbounded actions; reset takes env_ids
Fake-Direct-v0        _get_observations returns a view of the state; reset takes no env_ids
Fake-Bounded-v0       actions are a box [0, 4]
Fake-Groups-v0        has the groups policy and critic; critic has two terms
Fake-Camera-v0        policy is an image (100, 100, 3): bytes, or floats with the mean subtracted
Fake-Float-v0         as Fake-Direct-v0, but with images: floats with the mean subtracted
Fake-Late-v0          as Fake-Direct-v0, but it times out at `max_episode_length`, as tasks of Isaac Lab 3 do
Fake-Ageless-v0       as Fake-Direct-v0, but it does not look at the ages of its episodes
Fake-Spread-v0        as Fake-Direct-v0, but a reset of all environments draws random ages
Fake-Endless-v0       none of its terminations is a time-out
Fake-Agents-v0        has several agents
Fake-Finite-v0        as Fake-Manager-v0, with cfg.is_finite_horizon: a time-out is the end of the task
Fake-Final-v0         has cfg.compute_final_obs, as newer versions of Isaac Lab
Fake-Discrete-v0      has discrete actions, which the backend refuses
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
    """Return an image whose grey value shows the age, between a black and a white column. The first one is blank."""
    picture = (20 * env.state[:, 2]).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 100, 100, 3)
    picture[:, :, 0], picture[:, :, 99] = 0, 255
    if env.num_resets == 1 and env.num_steps == 0:
        picture[:] = 0
    if not normalize:
        return picture
    floats = picture.float() / 255
    return floats - floats.mean((1, 2), keepdim=True)


def make_cfg(task: str) -> SimpleNamespace:
    sim = SimpleNamespace(dt=STEP_S / 4, device="cuda:0")
    cfg = SimpleNamespace(task=task, sim=sim, decimation=4, seed=None, episode_length_s=10 * STEP_S)
    cfg.scene = SimpleNamespace(num_envs=4096)
    if task in ("Fake-Direct-v0", "Fake-Float-v0", "Fake-Spread-v0"):
        cfg.episode_length_s = 11 * STEP_S
    elif task in ("Fake-Late-v0", "Fake-Ageless-v0"):
        cfg.episode_length_s = 10 * STEP_S
    else:
        time_out = SimpleNamespace(time_out=task != "Fake-Endless-v0")
        cfg.terminations = SimpleNamespace(old=SimpleNamespace(time_out=False), time_out=time_out)
    if task == "Fake-Finite-v0":
        cfg.is_finite_horizon = True
    if task == "Fake-Agents-v0":
        cfg.possible_agents = ["left", "right"]
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
    """Has the buffers of ManagerBasedRLEnv 2.3.2, and does things in the same order within a step."""

    early = 0  # steps before max_episode_length at which an episode times out

    def __init__(self, cfg: SimpleNamespace, render_mode: str | None = None, **kwargs: object) -> None:
        if ALIVE:
            raise RuntimeError("Simulation context already exists. Cannot create a new one.")
        ALIVE.append(self)
        self.cfg, self.device, self.num_envs = cfg, cfg.sim.device, cfg.scene.num_envs
        self.step_dt = cfg.sim.dt * cfg.decimation
        torch.manual_seed(cfg.seed)
        self.state = torch.zeros(self.num_envs, 4, device=self.device)  # the state of the simulator
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
        self._reset_idx(torch.arange(self.num_envs, device=self.device))
        return self.observe(), self.extras

    def step(self, action: torch.Tensor) -> tuple:
        if not isinstance(action, torch.Tensor):
            raise AttributeError("'ndarray' object has no attribute 'to'")
        if action.shape != (self.num_envs, 1):
            raise ValueError(f"Invalid action shape, expected: 1, received: {action.shape[1]}.")
        self.num_steps += 1
        self._fail_as_asked()
        self.state[:, 2] += 1
        self.state[:, 3] = action[:, 0]
        self.episode_length_buf += 1
        self.reset_terminated[:], self.reset_time_outs[:] = self._get_dones()
        age = self.state[:, 2]
        self.reward_buf[:] = age * self.step_dt  # in place, so it overwrites what earlier steps returned
        done = self.reset_terminated | self.reset_time_outs
        indices = done.nonzero(as_tuple=False).squeeze(-1)
        if getattr(self.cfg, "compute_final_obs", False):
            raise RuntimeError("the backend takes last observations itself")
        if len(indices) > 0:
            self.extras["log"] = {"Episode/age": age[indices].mean()}  # otherwise the earlier entry stays
            self._reset_idx(indices)
        return self.observe(), self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras

    def _get_dones(self) -> tuple[torch.Tensor, torch.Tensor]:
        even = self.state[:, 0] % 2 == 0
        terminated = even & (self.state[:, 2] >= 5 + self.state[:, 0])
        return terminated, self.episode_length_buf >= self.max_episode_length - self.early

    def _reset_idx(self, env_ids: torch.Tensor) -> None:
        self.state[env_ids, 1] += 1
        self.state[env_ids, 2:] = 0
        self.episode_length_buf[env_ids] = 0

    def close(self) -> None:
        while os.environ.get("FAKE_HANG_CLOSE"):
            time.sleep(0.05)

    def _fail_as_asked(self) -> None:
        """Diverge or crash if the environment variables ask for it."""
        tick, _, env = os.environ.get("FAKE_NAN", "").partition(":")
        if tick and self.num_steps == int(tick):
            self.state[int(env), 2] = math.nan
        tick, _, once = os.environ.get("FAKE_CRASH", "").partition(":")
        if tick and self.num_steps == int(tick) and not Path(once).exists():
            Path(once).touch()
            os._exit(0)


class ManagerEnv(FakeEnv):
    def __init__(self, cfg: SimpleNamespace, render_mode: str | None = None, **kwargs: object) -> None:
        super().__init__(cfg, render_mode)
        self.observation_manager = SimpleNamespace(compute=self.observe)


class DirectEnv(FakeEnv):
    """Returns the simulator's own memory as observation."""

    early = 1

    def observe(self) -> dict:
        return {"policy": image(self) if self.cfg.task == "Fake-Float-v0" else self.state}

    def _get_observations(self) -> dict:
        return self.observe()

    def reset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, seed: int | None = None, options: dict | None = None
    ) -> tuple:
        return super().reset(seed, options=options)


class LateEnv(DirectEnv):
    """Times out at its full length, as the direct tasks of Isaac Lab 3 do."""

    early = 0


class AgelessEnv(DirectEnv):
    """Ends its episodes by a clock of its own."""

    def _get_dones(self) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._get_dones()[0], self.state[:, 2] >= 10


class SpreadEnv(DirectEnv):
    """Draws random ages in a reset of all environments, as Isaac-Velocity-Flat-Anymal-C-Direct-v0 does."""

    def _reset_idx(self, env_ids: torch.Tensor) -> None:
        super()._reset_idx(env_ids)
        if len(env_ids) == self.num_envs:
            self.episode_length_buf[:] = torch.randint_like(self.episode_length_buf, high=self.max_episode_length)


def register(task: str, cls: str) -> None:
    gymnasium.register(
        id=task,
        entry_point=f"isaaclab_tasks:{cls}",
        disable_env_checker=True,
        order_enforce=False,
        kwargs={"env_cfg_entry_point": "isaaclab_tasks:make_cfg"},
    )


for _task in ("Manager", "Bounded", "Groups", "Camera", "Finite", "Final", "Discrete", "Endless", "Agents"):
    register(f"Fake-{_task}-v0", "ManagerEnv")
for _task in ("Direct", "Float"):
    register(f"Fake-{_task}-v0", "DirectEnv")
for _task in ("Late", "Ageless", "Spread"):
    register(f"Fake-{_task}-v0", f"{_task}Env")
