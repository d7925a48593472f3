"""Checks of the settings of the backend `isaaclab`. Torch-free.

The tasks are not looked up here: Isaac Lab 2.3 registers them only after Isaac Sim has started, and the registration of
Isaac Lab 3 imports torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators.setting_checks import check_installed, refuse_frame_skip, refuse_task
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import Settings

HOW_TO_INSTALL = (
    "install isaaclab==3.0.0 (Python 3.12; many tasks need no Isaac Sim) or Isaac Lab 2.3 (Python 3.11 with Isaac Sim "
    "5.1), as docs/isaaclab.md describes"
)


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if neither Isaac Lab 2.3 nor 3 is installed, or a setting has no effect."""
    env = settings.env
    for module in ("isaaclab", "gymnasium"):
        check_installed(module, env, HOW_TO_INSTALL)
    _refuse_prerelease()
    if env.isaac_overrides and not is_isaac_lab_3():
        raise SettingError(
            f"env.isaac_overrides={env.isaac_overrides} has no effect with Isaac Lab 2.3, whose tasks have no presets; "
            "expected null; set env.isaac_overrides=null or install isaaclab==3.0.0"
        )
    refuse_task(env)
    refuse_frame_skip(env)


def is_isaac_lab_3() -> bool:
    """Return whether the installed Isaac Lab is version 3, without importing it: that would import torch."""
    return any((folder / "app" / "sim_launcher.py").exists() for folder in _folders("isaaclab"))


def _refuse_prerelease() -> None:
    """Raises: SettingError if this is a pre-release of Isaac Lab 3, which has other modules than the release."""
    for folder in _folders("isaaclab_tasks"):
        if (folder / "utils" / "sim_launcher.py").exists():
            raise SettingError(
                f"env.backend=isaaclab found a pre-release of Isaac Lab 3 in {folder}, which starts in another way "
                "than the release; expected isaaclab 3.0.0 or 2.3; install isaaclab==3.0.0"
            )


def _folders(package: str) -> list[Path]:
    """Return the folders of a top-level package, without importing it; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
