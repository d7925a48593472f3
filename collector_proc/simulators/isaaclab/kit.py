"""Start what Isaac Lab needs in this process, and restore what that start changes in it. Torch-free.

Isaac Lab 2.3 needs Kit, the application framework of Isaac Sim, and Kit must start before torch is imported. Isaac Lab
3 first reads the configuration of the task, which imports torch, and then starts Kit only if the task needs it.

Kit reads sys.argv, replaces sys.stdout, and installs a SIGTERM handler that closes the application but lets the process
go on. With its handlers, a segmentation fault never ends the process. This file restores all of that. The start of Kit
has been run with a stand-in for Kit, but not yet with a real Isaac Sim. Tasks without Kit run in the tests.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from collector_proc.simulators.ending import end_hard
from shared.errors import SimulatorError
from shared.lifetime import SIM_GPU_INDEX, renew_stack_dumps

# Kit would ask for these on the terminal, which an unattended process does not have. Values that the user has set stay.
ACCEPTED = {"OMNI_KIT_ACCEPT_EULA": "YES", "ACCEPT_EULA": "Y", "OMNI_KIT_ALLOW_ROOT": "1"}
TAKEN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FATAL_SIGNALS = (signal.SIGSEGV, signal.SIGABRT)


_launchers: list[Any] = []  # Kit closes when the last reference to its launcher goes, so the process keeps one


def start_kit(*, device: str, cameras: bool) -> None:
    """Start Kit for Isaac Lab 2.3, for the rest of this process. It takes minutes. Call it before torch is imported.

    Kit is never closed: its fast shutdown ends the process with code 0 even after a failure, and its slow shutdown can
    hang.
    Raises: SimulatorError outside the main thread, or if Kit tries to end the process.
    """
    with _starting(kit=True):
        from isaaclab.app import AppLauncher  # pyright: ignore[reportMissingImports]

        # With multi_gpu=True the renderer would use the learner's GPU as well.
        _launchers.append(AppLauncher(headless=True, device=device, enable_cameras=cameras, multi_gpu=False))


def start_for_task(cfg: Any, *, device: str, cameras: bool) -> None:
    """Start what this task of Isaac Lab 3 needs, for the rest of this process. A task without Kit needs nothing.

    cfg: the resolved configuration of the task.
    Raises: SimulatorError outside the main thread, or if Kit tries to end the process.
    """
    with _starting(kit=bool(reasons_for_kit(cfg))):
        from isaaclab.app import launch_simulation  # pyright: ignore[reportMissingImports]

        launch = launch_simulation(
            cfg, {"device": device, "headless": True, "enable_cameras": cameras, "multi_gpu": False}
        )
        launch.__enter__()
        _launchers.append(launch)


def reasons_for_kit(cfg: Any) -> list[str]:
    """Return why this task of Isaac Lab 3 needs Kit, in Isaac Lab's own words; empty if it does not."""
    from isaaclab.app import validate_launch  # pyright: ignore[reportMissingImports]

    return list(validate_launch(cfg, {"headless": True})[1])


@contextmanager
def _starting(*, kit: bool) -> Iterator[None]:
    """Let the code inside start a simulator that changes the process. kit: whether it starts Kit.

    Raises: SimulatorError outside the main thread, or if the code inside tries to end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        raise SimulatorError(
            "Isaac Lab was started outside the main thread; expected the main thread, because it installs signal "
            "handlers; build the simulator there"
        )
    for name, value in ACCEPTED.items() if kit else ():
        os.environ.setdefault(name, value)
    end_hard()
    try:
        with protected_process():
            yield
    except SystemExit as asked:
        raise SimulatorError(
            f"Isaac Sim tried to end the process with code {asked.code} while it started; expected it to run; if its "
            "licence is not accepted, set OMNI_KIT_ACCEPT_EULA=YES, otherwise read its output before this line"
        ) from asked


def simulator_device(device: str, *, cameras: bool) -> str:
    """Return the device to give to Isaac Lab 2.3. Without cameras it is `device`, counted among the visible GPUs.

    Isaac Sim 5.1 ignores CUDA_VISIBLE_DEVICES when it chooses the rendering GPU, but follows it for the physics GPU. If
    there are cameras and the simulator's GPU is not the first of the machine, this function removes
    CUDA_VISIBLE_DEVICES before CUDA starts and returns the GPU's index in the whole machine.
    """
    index = int(os.environ.get(SIM_GPU_INDEX, "0"))
    if not cameras or not device.startswith("cuda") or index <= 0:
        return device
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return f"cuda:{index}"


@contextmanager
def protected_process() -> Iterator[None]:
    """Restore arguments, output streams, signal handlers and the garbage collector after the code inside."""
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
        gc.enable()  # Kit disables it while it starts
