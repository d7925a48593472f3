"""Starting Isaac: before torch, in the main thread, and without letting it keep what it takes from the process. Torch-free.

AppLauncher forwards sys.argv to Kit, swaps sys.stdout, and answers SIGTERM by closing the app and going on; a segmentation
fault then never ends. All of that is put back. This project has executed it over a stand-in for Kit, never over a real Isaac
Sim. Isaac Lab 3, which starts otherwise, is refused by `checks.check_isaaclab`.
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

# Kit asks for these on the terminal, which an unattended process does not have. What the user has set stays.
ACCEPTED = {"OMNI_KIT_ACCEPT_EULA": "YES", "ACCEPT_EULA": "Y", "OMNI_KIT_ALLOW_ROOT": "1"}
TAKEN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FATAL_SIGNALS = (signal.SIGSEGV, signal.SIGABRT)


_launchers: list[Any] = []  # held to the end of the process: Kit closes with the last reference to its launcher


def start_kit(*, device: str, cameras: bool) -> None:
    """Start Kit, for the life of the process. Takes minutes. Call it before torch is imported.

    It is never closed: Kit's fast shutdown ends the process with code 0 whatever happened, and its slow one can hang.
    Raises: SimulatorError outside the main thread, or if Kit wants to end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        raise SimulatorError("Isaac Lab was started in a side thread; wanted the main thread: it installs handlers")
    for name, value in ACCEPTED.items():
        os.environ.setdefault(name, value)
    end_hard()
    try:
        with protected_process():
            from isaaclab.app import AppLauncher  # pyright: ignore[reportMissingImports]

            # multi_gpu would put the renderer on the learner's GPU as well
            _launchers.append(AppLauncher(headless=True, device=device, enable_cameras=cameras, multi_gpu=False))
    except SystemExit as asked:
        raise SimulatorError(
            f"Isaac Sim asked to end the process with code {asked.code} while it started; wanted it to run; if its licence "
            "is not accepted, set OMNI_KIT_ACCEPT_EULA=YES, else see what it wrote before this line"
        ) from asked


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
