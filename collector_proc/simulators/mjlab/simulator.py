"""Backend `mjlab`: any registered task of mjlab, thousands of environments on one device, which may be the CPU.

The task runs with `auto_reset=False`, so `step` returns the true last observation of ended episodes. Those environments
are then reset by index, and the policy acts on their first observation in the same tick. This file imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collector_proc.simulators.batched.joint_limits import actions_at_limits
from collector_proc.simulators.batched.spaces import ActionMap, ObservationMap
from collector_proc.simulators.batched.step import (
    BatchedStep,
    episode_length_s,
    finite_horizon,
    randomize_episode_lengths,
    whole_columns,
)
from collector_proc.simulators.batched.warp_order import warp_order
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from collector_proc.simulators.base import Arrival
    from shared.config import EnvSettings, Settings


class MjlabSimulator:
    """Steps env.num_envs environments of the task env.name on `device`."""

    frames_per_step = 1  # the task repeats actions itself (decimation)

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        env = settings.env
        assert env.num_envs is not None, "check_env refuses settings without env.num_envs"
        self._env = _make(env, num_envs=env.num_envs, seed=seed, device=device)
        self._torch_device = torch.device(self._env.device)
        self.device = str(self._torch_device)
        self._whole = whole_columns(settings, env.num_envs)
        with torch.no_grad(), warp_order(self._torch_device):
            obs, _ = self._env.reset()
        self._observe = ObservationMap(obs, env)
        space = self._env.single_action_space
        low, high = (torch.as_tensor(bound).expand(space.shape) for bound in (space.low, space.high))
        at_limits = actions_at_limits(self._env, env.action_bounds, device=self._torch_device)
        self._act = ActionMap(low, high, scale=env.action_scale, device=self._torch_device, at_limits=at_limits)
        self.action_range = self._act.range
        self._tick = BatchedStep(
            env.num_envs,
            device=self._torch_device,
            reward_factor=1 / self._env.step_dt if env.reward_per_second else 1.0,
            finite_horizon=finite_horizon(self._env.cfg, env),
            crash_dir=crash_dir,
            images=self._observe,
        )
        self.spec = StreamSpec(env.num_envs, self._observe.spec, self._act.action_dim)

    @property
    def environment(self) -> Any:
        """The environment of mjlab."""
        return self._env

    @property
    def num_diverged(self) -> int:
        """The number of rows that were not finite, as of the last tick that was checked. Never waits.

        Such rows are recorded as zeros and their environments are reset.
        """
        return self._tick.num_diverged

    def reset(self) -> Arrival:
        """Reset every environment. The first training episodes start at random ages if env.randomize_start is true."""
        with torch.no_grad(), warp_order(self._torch_device):
            obs, _ = self._env.reset()
            randomize_episode_lengths(self._env, whole=self._whole)
            return self._tick.begin(self._observe(obs))

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step of every environment. Shapes: action (E, A) in [-1, 1]. Raises: SimulatorError.

        Waits for the device to see whether an episode ended, as mjlab itself does in every step.
        """
        assert action.shape == (self.spec.num_envs, self.spec.action_dim), action.shape
        with torch.no_grad(), warp_order(self._torch_device):
            if (stuck := self._tick.pending()) is not None:
                self._env.reset(env_ids=stuck)
            obs, reward, terminated, time_out, _ = self._env.step(self._act(action))
            row = self._tick.row(self._observe(obs), reward, terminated, time_out)
            fresh, ended = row.obs, row.is_last.nonzero().squeeze(-1)
            if len(ended):
                fresh = self._observe(self._env.reset(env_ids=ended)[0])
            return self._tick.arrival(row, fresh, was_reset=row.is_last)

    def close(self) -> None:
        """Free the environment."""
        self._env.close()


def _make(env: EnvSettings, *, num_envs: int, seed: int, device: str) -> Any:
    """Build the task.

    Raises: SettingError if it does not fit the settings; SimulatorError if it does not start.
    """
    import mjlab.tasks  # noqa: F401  # importing it registers every task
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import load_env_cfg

    cfg = load_env_cfg(env.name)
    cfg.scene.num_envs, cfg.seed, cfg.auto_reset = num_envs, seed, False
    if env.horizon is not None:
        _cut_episodes(cfg, env.horizon)
    try:
        with warp_order(torch.device(device)):
            return ManagerBasedRlEnv(cfg, device=device)
    except Exception as error:
        raise SimulatorError(
            f"mjlab task {env.name} does not start on {device}: {type(error).__name__}: {error}; expected "
            f"{num_envs} environments to start; lower env.num_envs if memory ran out, otherwise run python -m "
            "launcher.probe with the same settings and report its output"
        ) from error


def _cut_episodes(cfg: Any, horizon: int) -> None:
    """Let the task's own time-out end episodes after `horizon` agent steps.

    Raises: SettingError if it has no time-out.
    """
    if not any(term is not None and term.time_out for term in cfg.terminations.values()):
        raise SettingError(
            f"env.horizon={horizon} has no effect, because the task has no time-out: its terminations are "
            f"{list(cfg.terminations)}; expected one with time_out=True; set env.horizon=null"
        )
    cfg.episode_length_s = episode_length_s(horizon, cfg.sim.mujoco.timestep * cfg.decimation)
