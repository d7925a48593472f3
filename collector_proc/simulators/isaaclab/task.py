"""Find a registered task of Isaac Lab, and set its configuration for this run. Import it after Isaac has started."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import TYPE_CHECKING, Any

import structlog

from collector_proc.simulators.batched.step import episode_length_s
from collector_proc.simulators.isaaclab.kit import reasons_for_kit
from collector_proc.simulators.isaaclab.overrides import parse_with_overrides
from collector_proc.simulators.setting_checks import unknown
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.config import EnvSettings, Settings

# Tasks that have another name in the other generation, as `_plain` writes names.
RENAMED = {
    "isaaccartpolergb": "isaaccartpolecamera",
    "isaaccartpolergbcameradirect": "isaaccartpolecameradirect",
}
IMAGE_TERMS = ("image", "image_rgb")  # the terms of Isaac Lab 2.3 and 3 that observe a camera's image


def find_and_configure(settings: Settings, *, device: str, seed: int, generation: int) -> tuple[str, Any]:
    """Return the registered id that env.name means, and its configuration with the values of this run.

    generation: 2 or 3, the version of Isaac Lab.
    Raises: SettingError if there is no such task, or the settings do not fit it.
    """
    import gymnasium
    import isaaclab_tasks  # noqa: F401  # pyright: ignore[reportMissingImports] # registers the tasks

    env = settings.env
    name = find_task(env.name, gymnasium.registry)
    own_resets = check_class(gymnasium.registry[name])
    cfg = task_cfg(settings, name, device=device, seed=seed, generation=generation)
    if generation == 3:
        cfg.compute_final_obs = own_resets
        check_runtime(cfg, env)
    return name, cfg


def find_task(name: str, registry: Mapping[str, Any]) -> str:
    """Return the registered id that env.name means. It may be an id of the other generation of Isaac Lab.

    A name such as "my_package.tasks:Isaac-Foo-v0" first imports the module before the colon, which registers the task.
    Isaac-Velocity-Flat-Anymal-D-v0 of Isaac Lab 2.3 and Isaac-Velocity-Flat-AnymalD of Isaac Lab 3 are the same task.
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
    if task in known:
        return task
    same = [id for id in known if _plain(id) == _plain(task)]
    if len(same) == 1:
        structlog.get_logger().warning("env.name has another form in this Isaac Lab", name=task, used=same[0])
        return same[0]
    prefix = f"{package}:" if package else ""
    raise unknown(f"env.name={name} is not a task of this Isaac Lab", task, known, setting=f"env.name={prefix}{{}}")


def _plain(task: str) -> str:
    """Return a task id without what differs between the generations: case, dashes, "Contrib", and the version."""
    letters = re.sub(r"-v\d+$", "", task).lower().replace("-", "")
    letters = re.sub("^isaaccontrib", "isaac", letters)
    return RENAMED.get(letters, letters)


def task_cfg(settings: Settings, task: str, *, device: str, seed: int, generation: int) -> Any:
    """Return the task's configuration with the values of this run. generation: 2 or 3, the version of Isaac Lab.

    Raises: SettingError if the settings do not fit the task.
    """
    from isaaclab_tasks.utils import parse_env_cfg  # pyright: ignore[reportMissingImports]

    env = settings.env
    if generation == 3:
        cfg = parse_with_overrides(task, env, device=device)
    else:
        cfg = parse_env_cfg(task, device=device, num_envs=env.num_envs)
    if hasattr(cfg, "possible_agents"):
        raise SettingError(
            f"env.name={env.name} is a task of several agents, {cfg.possible_agents}; expected a task of one agent; "
            "choose another env.name"
        )
    if env.reward_per_second and is_direct(cfg):
        raise SettingError(
            f"env.reward_per_second=true with the direct task {env.name}, whose own code decides whether rewards are "
            "multiplied by seconds; expected false; set env.reward_per_second=false and optimization.reward_scale "
            "instead"
        )
    cfg.seed = seed
    if env.horizon is not None:
        _cut_episodes(cfg, env.horizon)
    if env.from_pixels:
        _prepare_cameras(cfg)
    return cfg


def check_class(spec: Any) -> bool:
    """Return whether the environment's class has its own `_reset_envs_from_buffer`, as direct tasks of Isaac Lab 3 may.

    Such a method may reset environments by a mask, without `_reset_idx`, where last observations are taken. Isaac Lab
    forbids that if cfg.compute_final_obs is set, so the backend sets it for these tasks. spec: of gymnasium's registry.
    Raises: SettingError if it is one of Isaac Lab's experimental environments on Warp.
    """
    from gymnasium.envs.registration import load_env_creator

    creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    bases = creator.__mro__ if isinstance(creator, type) else ()
    for base in bases:
        if base.__module__.startswith("isaaclab_experimental"):
            raise SettingError(
                f"{spec.id} is an experimental environment of Isaac Lab ({base.__name__}) that returns arrays of "
                "Warp; expected a ManagerBasedRLEnv or DirectRLEnv; choose the stable task of the same robot"
            )
    owners = [base for base in bases if "_reset_envs_from_buffer" in vars(base)]
    return bool(owners) and not owners[0].__module__.startswith("isaaclab.envs")


def is_direct(cfg: Any) -> bool:
    """Return whether the task is direct. Manager-based tasks list their terminations, direct tasks compute them."""
    return not hasattr(cfg, "terminations")


def check_runtime(cfg: Any, env: EnvSettings) -> None:
    """Raises: SettingError if this task of Isaac Lab 3 needs Isaac Sim, or another package, that is not installed."""
    from isaaclab.app import validate_launch  # pyright: ignore[reportMissingImports]

    reasons = reasons_for_kit(cfg)
    if reasons and importlib.util.find_spec("isaacsim") is None:
        raise SettingError(
            f"env.name={env.name} needs Isaac Sim, which is not installed, for {' and '.join(reasons)}; expected "
            "Isaac Sim, or a task that runs without it; if the task has such a preset, set "
            "env.isaac_overrides=[physics=newton_mjwarp], otherwise choose another env.name or install Isaac Sim"
        )
    scan = validate_launch(cfg, {"headless": True})[0]
    for module, is_needed in (("ovphysx", scan.has_ovphysx_physics), ("ovrtx", scan.has_ovrtx)):
        if is_needed and importlib.util.find_spec(module) is None:
            raise SettingError(
                f"env.name={env.name} with env.isaac_overrides={env.isaac_overrides} needs the module {module}, which "
                f"is not installed; expected it; run pip install 'isaaclab[{module}]==3.0.0', or choose another "
                "physics or renderer"
            )


def correct_horizon(env: Any, horizon: int) -> None:
    """Let a direct task end its episodes after exactly `horizon` agent steps. Call it after a reset, before any step.

    A direct task compares the age of an episode with `max_episode_length` or with one step less; only its code shows
    which. So ages are set and the task is asked which episodes it would end.
    Raises: SettingError if the task ends its episodes at neither age.
    """
    if _times_out(env, horizon - 1):
        cfg = env.cfg
        cfg.episode_length_s = episode_length_s(horizon + 1, cfg.sim.dt * cfg.decimation)
    if _times_out(env, horizon - 1) or not _times_out(env, horizon):
        raise SettingError(
            f"env.horizon={horizon} cannot be set for {type(env).__name__}, which does not end its episodes by their "
            "age and cfg.episode_length_s; expected a task that compares episode_length_buf with max_episode_length; "
            "set env.horizon=null"
        )


def _times_out(env: Any, age: int) -> bool:
    """Return whether the task would end every episode of this age in agent steps. The ages are restored."""
    ages = env.episode_length_buf.clone()
    env.episode_length_buf[:] = age
    try:
        return bool(env._get_dones()[1].all())
    finally:
        env.episode_length_buf[:] = ages


def _cut_episodes(cfg: Any, horizon: int) -> None:
    """Let the task's own time-out end episodes after `horizon` agent steps. `correct_horizon` completes it.

    Raises: SettingError if it has no time-out.
    """
    if not is_direct(cfg) and not any(getattr(term, "time_out", False) for term in vars(cfg.terminations).values()):
        raise SettingError(
            f"env.horizon={horizon} has no effect, because the task has no time-out: its terminations are "
            f"{list(vars(cfg.terminations))}; expected one with time_out=True; set env.horizon=null"
        )
    cfg.episode_length_s = episode_length_s(horizon, cfg.sim.dt * cfg.decimation)


def _prepare_cameras(cfg: Any) -> None:
    """Configure cameras so that a reset shows a frame of the new episode, images stay bytes, and each is one frame.

    By default the first frame after a reset is of the old episode, the mean is subtracted from images, and Isaac Lab 3
    stacks two frames. The world model remembers earlier frames itself.
    """
    if hasattr(cfg, "num_rerenders_on_reset"):
        cfg.num_rerenders_on_reset = max(1, cfg.num_rerenders_on_reset)
    if hasattr(cfg, "frame_stack"):
        cfg.frame_stack = 1
    groups = getattr(cfg, "observations", None)  # direct tasks have none
    for group in vars(groups).values() if groups is not None else ():
        for term in vars(group).values() if hasattr(group, "__dict__") else ():
            params: Any = getattr(term, "params", None) or {}
            if "frame_stack" in params:
                params["frame_stack"] = 1
            name = getattr(getattr(term, "func", None), "__name__", "")
            if name in IMAGE_TERMS and params.get("data_type", "rgb") == "rgb":
                params["normalize"] = False
