"""Starting Isaac: before torch, in the main thread, and without letting it keep what it takes from the process. Torch-free.

    start()     Isaac Lab 2.x: AppLauncher, minutes of Kit start-up. Isaac Lab 3: nothing yet
    import torch, read the task's configuration
    enter(cfg)  Isaac Lab 3: launch_simulation(cfg), which starts what the configuration needs. 2.x: nothing more

AppLauncher forwards sys.argv to Kit, swaps sys.stdout, and answers SIGTERM by closing the app and going on; a segmentation
fault then never ends. All of that is put back. Only the path of 2.x has been executed by this project, over a stand-in for
Kit; neither a real Isaac Sim nor Isaac Lab 3 has.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from collector_proc.simulators.ending import end_hard
from shared.errors import SimulatorError
from shared.supervision import renew_stack_dumps

# Kit asks for these on the terminal, which an unattended process does not have. What the user has set stays.
ACCEPTED = {"OMNI_KIT_ACCEPT_EULA": "YES", "ACCEPT_EULA": "Y", "OMNI_KIT_ALLOW_ROOT": "1"}
TAKEN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FATAL_SIGNALS = (signal.SIGSEGV, signal.SIGABRT)
SIM_GPU_INDEX = "TANDEM_SIM_GPU_INDEX"  # set by launch: the simulator's GPU as nvidia-smi counts


class Launch(Protocol):
    """How one version of Isaac Lab is started."""

    name: str

    def start(self, *, device: str, cameras: bool) -> None: ...

    def enter(self, cfg: Any) -> None: ...


class KitLaunch:
    """Isaac Lab 2.x: one AppLauncher for the life of the process.

    It is never closed: Kit's fast shutdown ends the process with code 0 whatever happened, and its slow one can hang.
    """

    name = "AppLauncher"

    def __init__(self) -> None:
        self._launcher: Any = None

    def start(self, *, device: str, cameras: bool) -> None:
        """Raises: AssertionError if torch is loaded already, SimulatorError outside the main thread."""
        assert "torch" not in sys.modules, "torch was imported before the simulator started"
        if threading.current_thread() is not threading.main_thread():
            raise SimulatorError("Isaac Lab was started in a side thread; wanted the main thread: it installs handlers")
        for name, value in ACCEPTED.items():
            os.environ.setdefault(name, value)
        end_hard()
        with protected_process():
            from isaaclab.app import AppLauncher  # pyright: ignore[reportMissingImports]

            # multi_gpu would put the renderer on the learner's GPU as well
            self._launcher = AppLauncher(headless=True, device=device, enable_cameras=cameras, multi_gpu=False)

    def enter(self, cfg: Any) -> None:
        """Everything is running already."""


class SceneLaunch:
    """Isaac Lab 3: a context around the environment, entered with its configuration. Never executed by this project."""

    name = "launch_simulation"

    def __init__(self) -> None:
        self._context: Any = None
        self._arguments: dict[str, Any] = {}

    def start(self, *, device: str, cameras: bool) -> None:
        for name, value in ACCEPTED.items():
            os.environ.setdefault(name, value)
        self._arguments = {"headless": True, "device": device, "enable_cameras": cameras}
        end_hard()

    def enter(self, cfg: Any) -> None:
        from isaaclab_tasks.utils.sim_launcher import launch_simulation  # pyright: ignore[reportMissingImports]

        with protected_process():
            self._context = launch_simulation(cfg, self._arguments)
            self._context.__enter__()


def find_launch() -> Launch:
    """The way to start the installed Isaac Lab, found without importing it: its task package imports torch."""
    spec = importlib.util.find_spec("isaaclab_tasks")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "utils" / "sim_launcher.py").exists():
            return SceneLaunch()
    return KitLaunch()


def simulator_device(device: str, *, cameras: bool) -> str:
    """The device to name to Isaac. Without cameras cuda:0 of the masked GPUs.

    Isaac Sim 5.1 counts the rendering GPU without the mask and the physics GPU with it. With cameras on any GPU but the
    machine's first, the mask is therefore taken off before CUDA starts and the GPU is named by its own index.
    """
    index = int(os.environ.get(SIM_GPU_INDEX, "0"))
    if not cameras or not device.startswith("cuda") or index <= 0:
        return device
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return f"cuda:{index}"


@contextmanager
def protected_process() -> Iterator[None]:
    """What the code inside does to arguments, streams, signals and the collector of garbage is undone afterwards."""
    argv, stdout, stderr = sys.argv, sys.stdout, sys.stderr
    handlers = {signum: signal.getsignal(signum) for signum in TAKEN_SIGNALS}
    sys.argv = sys.argv[:1]
    try:
        yield
    finally:
        sys.argv, sys.stdout, sys.stderr = argv, stdout, stderr
        for signum, handler in handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for signum in FATAL_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        renew_stack_dumps()
        gc.enable()  # Kit turns it off while it starts
