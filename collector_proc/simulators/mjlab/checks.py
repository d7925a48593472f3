"""Checks of the settings of the backend `mjlab`. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector_proc.simulators.setting_checks import (
    ask_child,
    check_installed,
    refuse_frame_skip,
    refuse_task,
    unknown,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import Settings

LIST_TASKS = "import json, mjlab.tasks; from mjlab.tasks.registry import list_tasks; print(json.dumps(list_tasks()))"
LIST_TASKS_S = 180.0


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if mjlab is not installed, has no task env.name, or a setting has no effect."""
    env = settings.env
    check_installed("mjlab", env, "pip install mjlab==1.6.0")
    refuse_task(env)
    refuse_frame_skip(env)
    report("looking up mjlab's tasks: this imports mjlab once, which can take half a minute")
    tasks = ask_child(env, ("-c", LIST_TASKS), limit_s=LIST_TASKS_S)
    if env.name not in tasks:
        raise unknown(f"env.name={env.name} is not a task of mjlab", env.name, tasks, setting="env.name={}")
