"""Checks of the settings of the backend `example`. Torch-free, because launch imports this file."""

from collections.abc import Callable

from collector_proc.simulators.setting_checks import refuse_images, unknown
from shared.config import Settings


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if the task does not exist or images are asked for."""
    name = settings.env.name
    if name != "point":
        raise unknown(f"env.name={name} is not a task of env.backend=example", name, ["point"], setting="env.name={}")
    refuse_images(settings.env)
