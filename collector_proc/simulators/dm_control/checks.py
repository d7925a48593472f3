"""Checks of the settings of the backend `dm_control`. Torch-free."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from collector_proc.simulators.dm_control.environment import NO_RENDERER
from collector_proc.simulators.setting_checks import ask_child, unknown
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import EnvSettings, Settings

LIST_TASKS = "import json; from dm_control import suite; print(json.dumps(suite.ALL_TASKS))"
LIST_TASKS_S = 60.0
RENDERERS = ("egl", "osmesa", "glfw")


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if there is no such task, no renderer for images, or dm_control does not import."""
    env = settings.env
    _check_renderer(env)
    tasks = suite_tasks(env)
    domains = {domain for domain, _ in tasks}
    if env.name not in domains:
        raise unknown(f"env.name={env.name} is not a domain of dm_control", env.name, domains, setting="env.name={}")
    in_domain = [task for domain, task in tasks if domain == env.name]
    if env.task not in in_domain:
        raise unknown(f"env.task={env.task} is not a task of {env.name}", env.task, in_domain, setting="env.task={}")


def suite_tasks(env: EnvSettings) -> list[tuple[str, str]]:
    """Return every (domain, task) of the suite. Raises: SettingError if dm_control does not import."""
    return [(domain, task) for domain, task in ask_child(env, ("-c", LIST_TASKS), limit_s=LIST_TASKS_S)]


def _check_renderer(env: EnvSettings) -> None:
    """Raises: SettingError if MUJOCO_GL does not name a renderer that the observations can use."""
    chosen = os.environ.get("MUJOCO_GL")
    allowed = RENDERERS if env.from_pixels else (*RENDERERS, *NO_RENDERER)
    if chosen and chosen not in allowed:
        raise SettingError(
            f"MUJOCO_GL={chosen} cannot be used with env.from_pixels={str(env.from_pixels).lower()}; "
            f"expected one of {', '.join(RENDERERS)}; set MUJOCO_GL=egl or unset it"
        )
