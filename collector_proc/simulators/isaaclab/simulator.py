"""Backend `isaaclab`: every task that Isaac Lab registers, manager-based or direct, as one batch on one device.

Isaac Lab's step resets ended environments before it observes, so it does not return their last observations. A hook in
this file takes them just before those resets. A tick in which no episode ends has no extra cost. `extras["log"]` is not
read, because it keeps old values until the next reset.

Importing this file needs neither torch nor Isaac. Building the simulator starts Isaac first and imports torch after it.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import TYPE_CHECKING, Any

from collector_proc.simulators.isaaclab.kit import simulator_device, start_kit
from collector_proc.simulators.setting_checks import unknown
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from collector_proc.simulators.base import Arrival
    from collector_proc.simulators.batched.spaces import ActionMap
    from shared.config import Settings


class TerminalObservations:
    """Takes the last observations of episodes that end inside a step, after the rewards and before the resets.

    Side effect: when an episode ends, observations are computed twice, so sensor noise and stateful modifiers advance
    one extra step.
    """

    def __init__(self, env: Any, entries: Any) -> None:
        """Install the hook in the unwrapped environment. `entries` maps observation groups to stream entries.

        Raises: SimulatorError if the environment has no method to hook into.
        """
        if not hasattr(env, "_reset_idx"):
            raise SimulatorError(
                f"{type(env).__name__} has no method _reset_idx, where the last observations are taken; expected a "
                "ManagerBasedRLEnv or DirectRLEnv; choose another env.name"
            )
        self._env, self._entries, self._reset_idx = env, entries, env._reset_idx
        self._native = bool(getattr(env.cfg, "compute_final_obs", False))
        self._stepping = False
        self._caught: list[tuple[Any, dict[str, Tensor]]] = []
        if not self._native:
            env._reset_idx = self._hook

    def step(self, action: Tensor) -> tuple[Any, ...]:
        """Make one step of the environment and collect the last observations of the episodes that end in it."""
        self._caught, self._stepping = [], True
        try:
            return self._env.step(action)
        finally:
            self._stepping = False

    def reset(self, indices: Tensor) -> None:
        """Reset these environments outside a step."""
        self._reset_idx(indices)
        self._env.scene.write_data_to_sim()
        self._env.sim.forward()

    def put_into(self, obs: dict[str, Tensor], extras: dict[str, Any], done: Tensor) -> dict[str, Tensor]:
        """Return the observation after the step, in which ended episodes have their last observation.

        Waits for the device only if Isaac Lab itself reports final observations.
        """
        if self._native:
            return self._put_native(obs, extras, done)
        if not self._caught:
            return obs
        arrived = {name: entry.clone() for name, entry in obs.items()}
        # Reversed, because the first observation counts if an environment was reset twice in one step.
        for indices, rows in reversed(self._caught):
            for name, entry in rows.items():
                arrived[name][indices] = entry
        return arrived

    def _hook(self, env_ids: Any) -> Any:
        """Take the observations of the environments that are about to be reset, and reset them."""
        if self._stepping:
            indices = slice(None) if env_ids is None else env_ids
            # Cloned, because an observation may be a view of the state, which the reset overwrites.
            rows = {name: entry.clone() for name, entry in self._entries(self._observe(), indices).items()}
            self._caught.append((indices, rows))
        return self._reset_idx(env_ids)

    def _observe(self) -> dict[str, Any]:
        """Return the observation groups of the current state."""
        env = self._env
        if hasattr(env, "observation_manager"):
            return _compute_with_history(env.observation_manager)
        obs = dict(env._get_observations())
        if getattr(env.cfg, "observation_noise_model", None):
            obs["policy"] = env._observation_noise_model(obs["policy"])
        return obs

    def _put_native(self, obs: dict[str, Tensor], extras: dict[str, Any], done: Tensor) -> dict[str, Tensor]:
        """Do the work of `put_into` with the final observations that Isaac Lab reports. Raises: SimulatorError."""
        indices = done.nonzero().squeeze(-1)
        if not len(indices):
            return obs  # extras may still hold the final observations of an earlier step
        if "final_obs" not in extras:
            raise SimulatorError(
                f"cfg.compute_final_obs=True returned no extras['final_obs'] but {', '.join(extras)}; expected the "
                "last observations of ended episodes; install a version of Isaac Lab that this backend supports"
            )
        final = self._entries(extras["final_obs"])
        arrived = {name: entry.clone() for name, entry in obs.items()}
        for name, entry in arrived.items():
            entry[indices] = final[name][indices] if len(final[name]) == len(entry) else final[name]
        return arrived


class IsaacLabSimulator:
    """Steps env.num_envs environments of one registered task. Isaac allows one simulator per process."""

    frames_per_step = 1  # the task repeats actions itself (decimation)

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        """Start Isaac and build the task. With a real Isaac Sim this takes minutes.

        Raises: SettingError if a setting does not fit the task; SimulatorError if Isaac does not start.
        """
        cameras = settings.env.from_pixels
        self.device = simulator_device(device, cameras=cameras)
        assert "torch" not in sys.modules, "torch was imported before the simulator started"
        try:
            start_kit(device=self.device, cameras=cameras)
            self._build(settings, seed=seed, crash_dir=crash_dir)
        except (SettingError, SimulatorError):
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise SimulatorError(
                f"Isaac Lab did not start {settings.env.name}: {error!r}; expected Isaac Lab 2.3 with Isaac Sim 5.1; "
                "read the traceback and Kit's output above this message; to report it, run python -m launcher.probe "
                "with the same --config and settings"
            ) from error

    def _build(self, settings: Settings, *, seed: int, crash_dir: Path | None) -> None:
        """Build the task after Kit has started. Raises: SettingError, SimulatorError."""
        import gymnasium
        import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports] # registers the tasks
        import torch

        from collector_proc.simulators.batched.spaces import ObservationMap
        from collector_proc.simulators.batched.step import BatchedStep, finite_horizon, whole_columns

        env = settings.env
        task = _registered_task(env.name, gymnasium.registry)
        cfg = self._task_cfg(settings, task, seed=seed)
        with torch.no_grad():
            # Unwrapped, because gymnasium's wrappers hide the attributes that are used here.
            self._env: Any = gymnasium.make(task, cfg=cfg).unwrapped
            sample, _ = self._env.reset()
            if env.from_pixels:
                # The first reset observes before the textures are loaded, so its images may be blank.
                sample, _ = self._env.reset()
        self._whole = whole_columns(settings, self._env.num_envs)
        self._first_obs: Any = sample
        self._entries = ObservationMap(sample, env)
        self._terminal = TerminalObservations(self._env, self._entries)
        self._actions = self._action_map(env.action_scale)
        self.action_range = self._actions.range
        where = torch.device(self.device)
        factor = 1 / self._env.step_dt if env.reward_per_second else 1.0
        self._steps = BatchedStep(
            self._env.num_envs,
            device=where,
            reward_factor=factor,
            finite_horizon=finite_horizon(cfg, env),
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

        with torch.no_grad():
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
        with torch.no_grad():
            diverged = self._steps.pending()
            if diverged is not None:
                self._terminal.reset(diverged)
            obs, reward, terminated, time_out, extras = self._terminal.step(self._actions(action))
            done, fresh = terminated | time_out, self._entries(obs)
            row = self._steps.row(self._terminal.put_into(fresh, extras, done), reward, terminated, time_out)
            return self._steps.arrival(row, fresh, was_reset=done)

    def close(self) -> None:
        """Close the environment. Kit itself ends together with the process; see `kit.start_kit`."""
        try:
            self._env.close()
        except Exception:
            traceback.print_exc()  # the run is over, so a failure here must not change its result

    def _task_cfg(self, settings: Settings, task: str, *, seed: int) -> Any:
        """Return the task's configuration with the values of this run.

        Raises: SettingError if they do not fit the task.
        """
        from isaaclab_tasks.utils import parse_env_cfg  # pyright: ignore[reportMissingImports]

        env = settings.env
        cfg = parse_env_cfg(task, device=self.device, num_envs=env.num_envs)
        if hasattr(cfg, "possible_agents"):
            raise SettingError(
                f"env.name={env.name} is a task of several agents, {cfg.possible_agents}; expected a task of one "
                "agent; choose another env.name"
            )
        direct = not hasattr(cfg, "terminations")
        if env.reward_per_second and direct:
            raise SettingError(
                f"env.reward_per_second=true with the direct task {env.name}, whose rewards are not multiplied by "
                "seconds; expected false; set env.reward_per_second=false and optimization.reward_scale instead"
            )
        cfg.seed = seed
        if env.horizon is not None:
            _cut_episodes(cfg, env.horizon, direct=direct)
        if hasattr(cfg, "compute_final_obs"):
            cfg.compute_final_obs = True
        if env.from_pixels:
            _prepare_cameras(cfg)
        return cfg

    def _action_map(self, scale: float) -> ActionMap:
        """Return the map from [-1, 1] to the task's actions.

        Raises: SettingError unless they are one continuous vector.
        """
        import torch

        from collector_proc.simulators.batched.spaces import ActionMap

        space: Any = getattr(self._env, "single_action_space", None)
        if not hasattr(space, "low"):
            raise SettingError(
                f"the task's action space is {space}; expected one box of continuous actions for one agent; choose "
                "another env.name"
            )
        return ActionMap(space.low, space.high, scale=scale, device=torch.device(self.device))


def _registered_task(name: str, registry: Any) -> str:
    """Return the registered id that env.name means.

    A name such as "my_package.tasks:Isaac-Foo-v0" first imports the module before the colon, which registers the task.
    Raises: SettingError if the module cannot be imported or the task is not registered.
    """
    package, _, task = name.rpartition(":")
    if package:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise SettingError(
                f"env.name={name} names the module {package}, which cannot be imported: {error}; expected the module "
                f"that registers {task}; put its folder on PYTHONPATH, or install it"
            ) from error
    known = [id for id, spec in registry.items() if "env_cfg_entry_point" in spec.kwargs]
    if task not in known:
        prefix = f"{package}:" if package else ""
        raise unknown(f"env.name={name} is not a task of this Isaac Lab", task, known, setting=f"env.name={prefix}{{}}")
    return task


def _cut_episodes(cfg: Any, horizon: int, *, direct: bool) -> None:
    """Let the task's own time-out end episodes after `horizon` agent steps.

    Raises: SettingError if it has no time-out.
    """
    from collector_proc.simulators.batched.step import episode_length_s

    if not direct and not any(getattr(term, "time_out", False) for term in vars(cfg.terminations).values()):
        raise SettingError(
            f"env.horizon={horizon} has no effect, because the task has no time-out: its terminations are "
            f"{list(vars(cfg.terminations))}; expected one with time_out=True; set env.horizon=null"
        )
    # Direct tasks compare the age of an episode with max_episode_length - 1.
    cfg.episode_length_s = episode_length_s(horizon + direct, cfg.sim.dt * cfg.decimation)


def _compute_with_history(manager: Any) -> dict[str, Any]:
    """Return the observation groups as the step itself would compute them, with the newest frame in their histories.

    The history buffers are restored afterwards.
    """
    histories = getattr(manager, "_group_obs_term_history_buffer", {})
    buffers = [buffer for group in histories.values() for buffer in group.values()]
    if not buffers:
        return manager.compute()
    names = ("_buffer", "_pointer", "_num_pushes")
    kept = [[value.clone() if hasattr(value, "clone") else value for value in map(vars(b).get, names)] for b in buffers]
    try:
        return manager.compute(update_history=True)
    finally:
        for buffer, values in zip(buffers, kept, strict=True):
            vars(buffer).update(zip(names, values, strict=True))


def _prepare_cameras(cfg: Any) -> None:
    """Configure cameras so that a reset shows a frame of the new episode and images stay bytes.

    By default the first frame after a reset is of the old episode, and the mean is subtracted from images.
    """
    if hasattr(cfg, "num_rerenders_on_reset"):
        cfg.num_rerenders_on_reset = max(1, cfg.num_rerenders_on_reset)
    groups = getattr(cfg, "observations", None)  # direct tasks have none
    for group in vars(groups).values() if groups is not None else ():
        for term in vars(group).values() if hasattr(group, "__dict__") else ():
            params: Any = getattr(term, "params", None)
            if (
                getattr(getattr(term, "func", None), "__name__", "") == "image"
                and params.get("data_type", "rgb") == "rgb"
            ):
                params["normalize"] = False
