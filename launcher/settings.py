"""The settings of a run, checked as far as that is possible without a GPU. Torch-free."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from collector_proc.simulators.registry import check_env
from launcher.devices import Devices
from launcher.forwarding import check_logger
from launcher.options import DEFAULT_CONFIG, Options
from launcher.run_folder import check_unfinished
from shared.compose import compose, load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.geometry import check_settings
from shared.run_folder import RunFolder


def read_settings(options: Options, show: Callable[[str], None]) -> Settings:
    """Return the settings of the named config, or those of the resumed run, with the overrides of the command line.

    show: called with a line for the user before a check that takes long.
    Raises: SettingError if the settings cannot work.
    """
    if options.resume:
        folder = RunFolder(options.resume.resolve())
        settings = load_settings(folder.config, options.overrides)
        check_unfinished(folder, settings)
    else:
        settings = compose(options.config or DEFAULT_CONFIG, options.overrides)
    with _current_folder_importable():
        check_env(settings, show)
    check_settings(settings)
    check_logger(settings)
    check_compiler(settings)
    return settings


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
