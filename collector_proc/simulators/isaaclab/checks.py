"""Checks of the settings of the backend `isaaclab`. Torch-free.

The tasks are not looked up here: Isaac Lab registers them only after Isaac Sim has started.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators.setting_checks import check_installed, refuse_frame_skip, refuse_task
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import Settings


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if Isaac Lab 2.3 is not installed, or a setting has no effect."""
    python = "{}.{}".format(*sys.version_info)
    fix = f"Isaac Lab 2.3.2 needs Python 3.11 (this is {python}) and Isaac Sim 5.1: see its installation guide"
    for module in ("isaaclab", "gymnasium"):
        check_installed(module, settings.env, fix)
    _refuse_isaac_lab_3()
    refuse_task(settings.env)
    refuse_frame_skip(settings.env)


def _refuse_isaac_lab_3() -> None:
    """Recognise Isaac Lab 3 by a file of its task package. Importing the package would import torch.

    Raises: SettingError.
    """
    spec = importlib.util.find_spec("isaaclab_tasks")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "utils" / "sim_launcher.py").exists():
            raise SettingError(
                f"env.backend=isaaclab found Isaac Lab 3 in {folder}, which starts in another way and was never "
                "tested; expected Isaac Lab 2.3; install isaaclab 2.3.2 with Isaac Sim 5.1 in a separate environment"
            )
