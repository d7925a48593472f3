"""Read the configuration of a task of Isaac Lab 3 with env.isaac_overrides. Import it after Isaac has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.errors import SettingError

if TYPE_CHECKING:
    from shared.config import EnvSettings

SELECTORS = ("physics", "renderer", "presets")  # what may be set beside fields of the task
# The backend sets these fields itself.
OWNED = {
    "env.scene.num_envs": "env.num_envs",
    "env.seed": "env.seed",
    "env.sim.device": "--sim-gpu, or --device of the probe",
    "env.compute_final_obs": "this backend, which takes last observations itself",
}
OWNED_WITH_HORIZON = {"env.episode_length_s": "env.horizon"}
OWNED_WITH_IMAGES = dict.fromkeys(("env.frame_stack", "env.num_rerenders_on_reset"), "env.from_pixels=true")


def parse_with_overrides(task: str, env: EnvSettings, *, device: str) -> Any:
    """Return the task's configuration with env.isaac_overrides.

    Raises: SettingError if an override would have no effect, or Isaac Lab does not accept it.
    """
    from isaaclab_tasks.utils import parse_env_cfg  # pyright: ignore[reportMissingImports]

    overrides = list(env.isaac_overrides or ())
    try:
        fields = _checked_fields(overrides, env)
        selected = [override for override in overrides if override.partition("=")[0] in SELECTORS]
        before = parse_env_cfg(task, overrides=selected) if fields else None
        values = {field: _value(before, field) for field in fields}  # Isaac Lab accepts a field that does not exist
        cfg = parse_env_cfg(task, device=device, num_envs=env.num_envs, overrides=overrides)
        for field, value in values.items():
            _check_kind(field, value, _value(cfg, field))
    except (Exception, SystemExit) as error:
        if not overrides:
            raise
        raise SettingError(
            f"env.isaac_overrides={overrides} does not fit {task}: {error}; expected presets and fields that the task "
            "has; correct them or set env.isaac_overrides=null"
        ) from error
    return cfg


def _checked_fields(overrides: Sequence[str], env: EnvSettings) -> list[str]:
    """Return the names of the fields that are set. Raises: ValueError if one is set elsewhere, or is no field."""
    owned = OWNED | (OWNED_WITH_HORIZON if env.horizon is not None else {})
    owned |= OWNED_WITH_IMAGES if env.from_pixels else {}
    fields = []
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"{override} has no '='; each item must be NAME=VALUE")
        if name in owned:
            raise ValueError(f"{name} is set by {owned[name]}")
        if name in SELECTORS:
            continue
        if not name.startswith("env."):
            raise ValueError(f"{name} is neither {', '.join(SELECTORS)} nor a field of the task that begins with env.")
        fields.append(name)
    return fields


def _value(cfg: Any, field: str) -> Any:
    """Return the value of a field such as env.sim.dt. A part of its name is an attribute, or the key of a mapping.

    Raises: ValueError if there is no such field.
    """
    for name in field.split(".")[1:]:
        if not (name in cfg if isinstance(cfg, Mapping) else hasattr(cfg, name)):
            raise ValueError(f"{field} is neither {', '.join(SELECTORS)} nor a field of the task that begins with env.")
        cfg = cfg[name] if isinstance(cfg, Mapping) else getattr(cfg, name)
    return cfg


def _check_kind(field: str, before: Any, after: Any) -> None:
    """Raises: ValueError if a number has become a text."""
    if isinstance(before, int | float) and isinstance(after, str):
        raise ValueError(f"{field}={after} is no number, and the task has {before} there")
