"""Backend `isaaclab`: every task Isaac Lab registers, manager-based or direct, E environments in one batch on one device.

Its step resets ended environments before it observes and hands out none of their last observations. They are taken here,
from a hook that runs just before those resets; a tick without an ended episode pays nothing for it. What is not read:
`extras["log"]`, which between resets still holds what was written at the last one.

Importing this file needs neither torch nor Isaac; building the simulator starts Isaac first and imports torch after it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from typing import TYPE_CHECKING, Any

from collector_proc.simulators.isaaclab.kit import simulator_device, start_kit
from shared.errors import SettingError, SimulatorError
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from collector_proc.simulators.base import Arrival
    from collector_proc.simulators.batched.spaces import ActionMap
    from shared.config import Settings


class TerminalObservations:
    """The last observations of episodes that end inside a step, caught between the rewards and the resets.

    Limits: what observing draws or counts by itself (sensor noise, modifiers with a memory) is drawn once more in such a tick.
    """

    def __init__(self, env: Any, entries: Any) -> None:
        """env: unwrapped; entries: observation groups to stream entries. Raises: SimulatorError without anything to hook."""
        if not hasattr(env, "_reset_idx"):
            raise SimulatorError(
                f"{type(env).__name__} has no _reset_idx, the place where last observations are taken; wanted a "
                "ManagerBasedRLEnv or DirectRLEnv; choose another env.name"
            )
        self._env, self._entries, self._reset_idx = env, entries, env._reset_idx
        self._native = bool(getattr(env.cfg, "compute_final_obs", False))
        self._stepping = False
        self._caught: list[tuple[Any, dict[str, Tensor]]] = []
        if not self._native:
            env._reset_idx = self._hook

    def step(self, action: Tensor) -> tuple[Any, ...]:
        """The environment's own step, with the hook in place."""
        self._caught, self._stepping = [], True
        try:
            return self._env.step(action)
        finally:
            self._stepping = False

    def reset(self, indices: Tensor) -> None:
        """Begin these environments anew, outside a step."""
        self._reset_idx(indices)
        self._env.scene.write_data_to_sim()
        self._env.sim.forward()

    def put_into(self, obs: dict[str, Tensor], extras: dict[str, Any], done: Tensor) -> dict[str, Tensor]:
        """The entries on arrival: those of the observation after the step, of ended episodes their last.

        Waits for the device only where Isaac Lab itself reports final observations.
        """
        if self._native:
            return self._put_native(obs, extras, done)
        if not self._caught:
            return obs
        arrived = {name: entry.clone() for name, entry in obs.items()}
        for indices, rows in reversed(self._caught):  # of an environment reset twice in a step the first counts
            for name, entry in rows.items():
                arrived[name][indices] = entry
        return arrived

    def _hook(self, env_ids: Any) -> Any:
        if self._stepping:
            indices = slice(None) if env_ids is None else env_ids
            # cloned: what is observed may be a view of the state that the reset is about to overwrite
            rows = {name: entry.clone() for name, entry in self._entries(self._observe(), indices).items()}
            self._caught.append((indices, rows))
        return self._reset_idx(env_ids)

    def _observe(self) -> dict[str, Any]:
        env = self._env
        if hasattr(env, "observation_manager"):
            return _compute_with_history(env.observation_manager)
        obs = dict(env._get_observations())
        if getattr(env.cfg, "observation_noise_model", None):
            obs["policy"] = env._observation_noise_model(obs["policy"])
        return obs

    def _put_native(self, obs: dict[str, Tensor], extras: dict[str, Any], done: Tensor) -> dict[str, Tensor]:
        indices = done.nonzero().squeeze(-1)
        if not len(indices):
            return obs  # extras may still hold those of an earlier step
        if "final_obs" not in extras:
            raise SimulatorError(
                f"cfg.compute_final_obs=True brought no extras['final_obs'], only {', '.join(extras)}; wanted the last "
                "observations of ended episodes; this Isaac Lab is newer than what this backend knows"
            )
        final = self._entries(extras["final_obs"])
        arrived = {name: entry.clone() for name, entry in obs.items()}
        for name, entry in arrived.items():
            entry[indices] = final[name][indices] if len(final[name]) == len(entry) else final[name]
        return arrived


class IsaacLabSimulator:
    """env.num_envs environments of one registered task. One per process: Isaac allows no second."""

    frames_per_step = 1  # the task's own decimation is part of its step

    def __init__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None = None) -> None:
        """Takes minutes with a real Isaac Sim. Raises: SettingError, SimulatorError."""
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
                f"Isaac Lab did not start {settings.env.name}: {error!r}; wanted Isaac Lab 2.3 with Isaac Sim 5.1; "
                "run python -m launcher.probe --config isaaclab, which reports step by step"
            ) from error

    def _build(self, settings: Settings, *, seed: int, crash_dir: Path | None) -> None:
        import gymnasium
        import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports] # registers the tasks
        import torch

        from collector_proc.simulators.batched.spaces import ObservationMap
        from collector_proc.simulators.batched.step import ManagerStep, finite_horizon, whole_columns

        env = settings.env
        task = _registered_task(env.name, gymnasium.registry)
        cfg = self._task_cfg(settings, task, seed=seed)
        with torch.no_grad():
            # unwrapped: gymnasium's wrappers hide the attributes that are used here
            self._env: Any = gymnasium.make(task, cfg=cfg).unwrapped
            sample, _ = self._env.reset()
            if env.from_pixels:  # the first reset observes before it waits for textures: its images may be blank
                sample, _ = self._env.reset()
        self._whole = whole_columns(settings, self._env.num_envs)
        self._first_obs: Any = sample
        self._entries = ObservationMap(sample, env)
        self._terminal = TerminalObservations(self._env, self._entries)
        self._actions = self._action_map(env.action_scale)
        where = torch.device(self.device)
        factor = 1 / self._env.step_dt if env.reward_per_second else 1.0
        self._steps = ManagerStep(
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
        """Rows that were not finite, as of the last tick looked at. Never waits."""
        return self._steps.num_diverged

    def reset(self) -> Arrival:
        """Start every environment anew; the first training episodes at random ages."""
        import torch

        from collector_proc.simulators.batched.step import randomize_episode_lengths

        with torch.no_grad():
            # building has reset it, to see what there is to observe
            obs = self._first_obs if self._first_obs is not None else self._env.reset()[0]
            self._first_obs = None
            randomize_episode_lengths(self._env, whole=self._whole)
            return self._steps.begin(self._entries(obs))

    def step(self, action: Tensor) -> Arrival:
        """One agent step of every environment. action: (E, A) in [-1, 1]. Raises: SimulatorError."""
        import torch

        assert action.shape == (self.spec.num_envs, self.spec.action_dim), action.shape
        with torch.no_grad():  # not inference_mode: the environment's buffers are written in place for ever after
            diverged = self._steps.pending()
            if diverged is not None:
                self._terminal.reset(diverged)
            obs, reward, terminated, time_out, extras = self._terminal.step(self._actions(action))
            done, fresh = terminated | time_out, self._entries(obs)
            row = self._steps.row(self._terminal.put_into(fresh, extras, done), reward, terminated, time_out)
            return self._steps.arrival(row, fresh, was_reset=done)

    def close(self) -> None:
        """Free the environment. Kit itself is left to the end of the process; see `kit.start_kit`."""
        try:
            self._env.close()
        except Exception:
            traceback.print_exc()  # the run is over: how it went is not for the teardown to say

    def _task_cfg(self, settings: Settings, task: str, *, seed: int) -> Any:
        """The task's configuration with this run's values. Raises: SettingError where they do not fit."""
        from isaaclab_tasks.utils import parse_env_cfg  # pyright: ignore[reportMissingImports]

        env = settings.env
        cfg = parse_env_cfg(task, device=self.device, num_envs=env.num_envs)
        if hasattr(cfg, "possible_agents"):
            raise SettingError(
                f"env.name={env.name} is a task of several agents, {cfg.possible_agents}; wanted one of one agent; choose "
                "another env.name"
            )
        direct = not hasattr(cfg, "terminations")
        if env.reward_per_second and direct:
            raise SettingError(
                f"env.reward_per_second=true with the direct task {env.name}, whose rewards nobody multiplies by seconds; "
                "wanted false; set env.reward_per_second=false and optimization.reward_scale instead"
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
        """Raises: SettingError on anything but one continuous action vector."""
        import torch

        from collector_proc.simulators.batched.spaces import ActionMap

        space: Any = getattr(self._env, "single_action_space", None)
        if not hasattr(space, "low"):
            raise SettingError(
                f"the task's action space is {space}; wanted one box of continuous actions for one agent; choose another "
                "env.name"
            )
        return ActionMap(space.low, space.high, scale=scale, device=torch.device(self.device))


def _registered_task(name: str, registry: Any) -> str:
    """The id of a task of Isaac Lab, or of the package that is named before it: "my_package.tasks:Isaac-Foo-v0".

    Raises: SettingError if there is none.
    """
    package, _, task = name.rpartition(":")
    if package:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise SettingError(
                f"env.name={name} names the module {package}, which does not import: {error}; wanted the one that registers "
                f"{task}; put its folder on PYTHONPATH, or install it"
            ) from error
    known = [id for id, spec in registry.items() if "env_cfg_entry_point" in spec.kwargs]
    if task not in known:
        nearest = difflib.get_close_matches(task, known, n=4, cutoff=0.0)
        raise SettingError(
            f"env.name={name} is no task of this Isaac Lab; wanted one of its {len(known)} registered ids, such as "
            f"{', '.join(nearest)}, or my_package.tasks:Id; set env.name to it"
        )
    return task


def _cut_episodes(cfg: Any, horizon: int, *, direct: bool) -> None:
    """Let the task's own time-out cut after `horizon` agent steps. Raises: SettingError if it has none."""
    from collector_proc.simulators.batched.step import episode_length_s

    if not direct and not any(getattr(term, "time_out", False) for term in vars(cfg.terminations).values()):
        raise SettingError(
            f"env.horizon={horizon} has no time-out to move: the task's terminations are {list(vars(cfg.terminations))}; "
            "wanted one with time_out=True; set env.horizon=null"
        )
    # direct tasks compare their age with max_episode_length - 1
    cfg.episode_length_s = episode_length_s(horizon + direct, cfg.sim.dt * cfg.decimation)


def _compute_with_history(manager: Any) -> dict[str, Any]:
    """The groups as the step itself would observe them, with the newest frame in their histories; these stay as they are."""
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
    """Frames of this episode, and bytes: by default a reset shows the old frame and images come with their mean taken off."""
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
