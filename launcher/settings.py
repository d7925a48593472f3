"""The settings of a run, checked as far as that is possible without a GPU. Torch-free."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from collector_proc.simulators.registry import check_env
from launcher.devices import Devices
from launcher.forwarding import check_logger
from launcher.options import DEFAULT_CONFIG, Options
from launcher.run_folder import check_unfinished
from shared.compose import compose, load_settings, setting_keys
from shared.config import Settings
from shared.errors import SettingError, together
from shared.geometry import check_settings
from shared.run_folder import RunFolder

# A resume must keep these: they decide what the rows of the replay are, and so what the networks have learned.
FIXED_KEYS = (
    "env.backend",
    "env.name",
    "env.task",
    "env.frame_skip",
    "env.from_pixels",
    "env.grayscale",
    "env.action_scale",
    "env.action_bounds",
    "env.obs_groups",
    "env.image_low",
    "env.image_high",
    "env.reward_per_second",
    "optimization.reward_scale",
)


def read_settings(options: Options, show: Callable[[str], None]) -> Settings:
    """Return the settings of the named config, or those of the resumed run, with the overrides of the command line.

    show: called with a line for the user before a check that takes long.
    Raises: SettingError if the settings cannot work.
    """
    before: Settings | None = None
    settings = compose_settings(options)
    if options.resume is not None:
        folder = RunFolder(options.resume.resolve())
        before = load_settings(folder.config, on_missing=show)
        check_changes(before, settings)
        check_unfinished(folder, settings)
    with _current_folder_importable():
        check_env(settings, show)
    check_settings(settings)
    check_logger(settings)
    check_compiler(settings)
    if before is not None:
        for key, old, new in changed_settings(before, settings):
            show(f"changed: {key}={old} -> {new}")
    return settings


def compose_settings(options: Options) -> Settings:
    """Return what `read_settings` checks further: keys, types and bounds are right. Raises: SettingError."""
    if options.resume is not None:
        return load_settings(RunFolder(options.resume.resolve()).config, options.overrides)
    return compose(DEFAULT_CONFIG if options.config is None else options.config, options.overrides)


def changed_settings(before: Settings, now: Settings) -> list[tuple[str, Any, Any]]:
    """Return key, value before and value now of every setting that differs."""
    old, new = _values(before), _values(now)
    return [(key, old[key], new[key]) for key in old if old[key] != new[key]]


def check_changes(before: Settings, now: Settings) -> None:
    """Raise SettingError if a resume changes what the weights or the replay of the checkpoint mean."""
    wrong = [
        SettingError(
            f"{key}={new} changes the meaning of the checkpoint, which was made with {key}={old}; expected the same "
            "value; leave it out, or start a new run"
        )
        for key, old, new in changed_settings(before, now)
        if key in FIXED_KEYS or (key.startswith("networks.") and key != "networks.exploration_noise")
    ]
    if wrong:
        raise together(wrong)


def _values(settings: Settings) -> dict[str, Any]:
    """Return the value of every setting under its dotted key."""
    return {key: attrgetter(key)(settings) for key, _ in setting_keys()}


def check_compiler(settings: Settings) -> None:
    """Raise SettingError if torch.compile is on and the C++ compiler that it needs is missing."""
    compile = settings.optimization.compile
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if compile.enabled and compile.backend == "inductor" and not any(map(shutil.which, compilers)):
        raise SettingError(
            f"optimization.compile.enabled=true, but the PATH has no C++ compiler ({' or '.join(compilers)}); expected "
            "one, because torch.compile needs it; run: apt install g++, or set optimization.compile.enabled=false"
        )


def check_gpu_compiler(settings: Settings, devices: Devices) -> None:
    """Raise SettingError if Triton, which compiles for the GPU, lacks a C compiler or the headers of Python."""
    options = settings.optimization.compile
    if devices.train is None or not options.enabled or options.backend != "inductor":
        return
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = []
    if not any(map(shutil.which, compilers)):
        missing.append(f"a C compiler ({' or '.join(compilers)})")
    if not header.exists():
        missing.append(f"the headers of Python ({header})")
    if missing:
        raise SettingError(
            f"optimization.compile.enabled=true on a GPU, but this machine lacks {' and '.join(missing)}; expected "
            "both, because torch.compile needs them; run: apt install gcc python3-dev, or set "
            "optimization.compile.enabled=false"
        )


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let checks find the user's modules in the current folder, as the collector will: it starts there with `-m`."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
