"""Checks of the settings of the backend `pendulum`. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector_proc.simulators.pendulum.simulator import TASKS
from collector_proc.simulators.setting_checks import refuse_images
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import Settings


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if the task does not exist or images are asked for."""
    env = settings.env
    if env.name != "pendulum" or env.task not in TASKS:
        raise SettingError(
            f"env.name={env.name} env.task={env.task} is not a task of env.backend=pendulum; expected "
            f"env.name=pendulum and one of {', '.join(TASKS)} as env.task; set env.name=pendulum env.task={TASKS[0]}"
        )
    refuse_images(env)
