"""Backend `isaaclab`: every task that Isaac Lab registers, manager-based or direct, as one batch on one device.

It runs Isaac Lab 2.3, which needs Isaac Sim, and Isaac Lab 3, many of whose tasks run without it. Isaac Lab's step
resets ended environments before it observes, so it does not return their last observations. A hook
(`terminal_observations.py`) takes them just before those resets. A tick in which no episode ends has no extra cost.
`extras["log"]` is not read, because it keeps old values until the next reset.

Importing this file needs neither torch nor Isaac. Building the simulator starts Isaac first and imports torch after it.
"""

from __future__ import annotations

import functools
import sys
import traceback
from typing import TYPE_CHECKING, Any

from collector_proc.simulators.isaaclab.checks import is_isaac_lab_3
from collector_proc.simulators.isaaclab.kit import simulator_device, start_for_task, start_kit
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from collector_proc.simulators.base import Arrival
    from collector_proc.simulators.batched.spaces import ActionMap
    from shared.config import EnvSettings, Settings

NAMES = {2: "Isaac Lab 2.3", 3: "Isaac Lab 3"}
# What the generations of Isaac Lab need to start a task, and how to provide it.
EXPECTED = {
    2: "expected Isaac Sim 5.1 beside it; install it, or put the folder of Isaac Lab 3 first on "
    "PYTHONPATH if you have one",
    3: "expected every package and robot that the task needs; if robots cannot be downloaded, set "
    "ISAACSIM_ASSET_ROOT to a folder of them, as docs/isaaclab.md describes",
}


class IsaacLabSimulator:
    """Steps env.num_envs environments of one registered task. Isaac allows one simulator per process."""

    frames_per_step = 1  # the task repeats actions itself (decimation)

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        """Start Isaac and build the task. With a real Isaac Sim this takes minutes.

        Raises: SettingError if a setting does not fit the task; SimulatorError if Isaac does not start.
        """
        self.device = device
        self._generation = 3 if is_isaac_lab_3() else 2
        try:
            if self._generation == 2:
                assert "torch" not in sys.modules, "torch was imported before the simulator started"
                cameras = settings.env.from_pixels
                self.device = simulator_device(device, cameras=cameras)
                start_kit(device=self.device, cameras=cameras)
            self._build(settings, seed=seed, crash_dir=crash_dir)
        except (SettingError, SimulatorError):
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise SimulatorError(
                f"{NAMES[self._generation]} did not start {settings.env.name}: {error!r}; "
                f"{EXPECTED[self._generation]}; if that is not it, read the traceback and the simulator's output above "
                "this message; to report it, run python -m launcher.probe with the same --config and settings"
            ) from error

    def _build(self, settings: Settings, *, seed: int, crash_dir: Path | None) -> None:
        """Build the task. With Isaac Lab 2.3, Kit has started. Raises: SettingError, SimulatorError."""
        import torch

        from collector_proc.simulators.batched.spaces import ObservationMap
        from collector_proc.simulators.batched.step import BatchedStep, finite_horizon, whole_columns
        from collector_proc.simulators.isaaclab.terminal_observations import TerminalObservations

        env = settings.env
        with torch.no_grad():
            self._env: Any = self._make(settings, seed=seed)
            self._first_obs: Any = self._first_reset(env)
        self._whole = whole_columns(settings, self._env.num_envs)
        self._entries = ObservationMap(self._first_obs, env)
        self._terminal = TerminalObservations(self._env, self._entries)
        self._actions = _action_map(self._env, env, self.device)
        self.action_range = self._actions.range
        factor = 1 / self._env.step_dt if env.reward_per_second else 1.0
        self._steps = BatchedStep(
            self._env.num_envs,
            device=torch.device(self.device),
            reward_factor=factor,
            finite_horizon=finite_horizon(self._env.cfg, env),
            crash_dir=crash_dir,
            images=self._entries,
        )
        self.spec = StreamSpec(self._env.num_envs, self._entries.spec, self._actions.action_dim)

    @property
    def num_diverged(self) -> int:
        """The number of rows that were not finite, as of the last tick that was checked. Never waits."""
        return self._steps.num_diverged

    def reset(self) -> Arrival:
        """Reset every environment. The first training episodes start at random ages if env.randomize_start is true."""
        import torch

        from collector_proc.simulators.batched.step import randomize_episode_lengths

        with torch.no_grad(), self._in_order():
            # __init__ has already reset the environment, to see which observations there are.
            obs = self._first_obs if self._first_obs is not None else self._env.reset()[0]
            self._first_obs = None
            randomize_episode_lengths(self._env, whole=self._whole)
            return self._steps.begin(self._entries(obs))

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step of every environment. Shapes: action (E, A) in [-1, 1]. Raises: SimulatorError."""
        import torch

        assert action.shape == (self.spec.num_envs, self.spec.action_dim), action.shape
        # Not inference_mode: later steps write into the environment's buffers, which would then be inference tensors.
        with torch.no_grad(), self._in_order():
            diverged = self._steps.pending()
            if diverged is not None:
                self._terminal.reset(diverged)
            obs, reward, terminated, time_out, _ = self._terminal.step(self._actions(action))
            fresh = self._entries(obs)
            row = self._steps.row(self._terminal.put_into(fresh), reward, terminated, time_out)
            return self._steps.arrival(row, fresh, was_reset=terminated | time_out)

    def close(self) -> None:
        """Close the environment. Kit itself ends together with the process; see `kit.start_kit`."""
        try:
            self._env.close()
        except Exception:
            traceback.print_exc()  # the run is over, so a failure here must not change its result

    def _make(self, settings: Settings, *, seed: int) -> Any:
        """Return the unwrapped environment. Raises: SettingError, SimulatorError."""
        import gymnasium
        import torch

        from collector_proc.simulators.batched.warp_order import warp_order
        from collector_proc.simulators.isaaclab.task import find_and_configure

        name, cfg = find_and_configure(settings, device=self.device, seed=seed, generation=self._generation)
        if self._generation == 3:
            start_for_task(cfg, device=self.device, cameras=settings.env.from_pixels)
            self.device = cfg.sim.device  # Kit may have chosen another name for it
        self._in_order = functools.partial(warp_order, torch.device(self.device))
        # Unwrapped, because gymnasium's wrappers hide the attributes that are used here.
        with self._in_order():
            return gymnasium.make(name, cfg=cfg).unwrapped

    def _first_reset(self, env: EnvSettings) -> Any:
        """Reset every environment, and return the observation groups. Raises: SettingError."""
        from collector_proc.simulators.isaaclab.task import correct_horizon, is_direct

        with self._in_order():
            sample, _ = self._env.reset()
            if env.horizon is not None and is_direct(self._env.cfg):
                correct_horizon(self._env, env.horizon)
                sample, _ = self._env.reset()
            if env.from_pixels:
                # The first reset observes before the textures are loaded, so its images may be blank.
                sample, _ = self._env.reset()
        return sample


def _action_map(environment: Any, env: EnvSettings, device: str) -> ActionMap:
    """Return the map from [-1, 1] to the task's actions.

    Raises: SettingError unless they are one continuous vector.
    """
    import torch

    from collector_proc.simulators.batched.joint_limits import actions_at_limits
    from collector_proc.simulators.batched.spaces import ActionMap

    space: Any = getattr(environment, "single_action_space", None)
    if not hasattr(space, "low"):
        raise SettingError(
            f"the task's action space is {space}; expected one box of continuous actions for one agent; choose "
            "another env.name"
        )
    where = torch.device(device)
    at_limits = actions_at_limits(environment, env.action_bounds, device=where)
    return ActionMap(space.low, space.high, scale=env.action_scale, device=where, at_limits=at_limits)
