"""The fake `isaaclab` of tier A. Its AppLauncher changes the process as the real one does, without Kit.

Put this folder on PYTHONPATH. These environment variables are switches:

    FAKE_RECORD=file       append the state of the process at the start to the file, as JSON
    FAKE_NAN=tick:env      make the state of an environment NaN
    FAKE_CRASH=tick:file   end the process with exit code 0, unless the file exists; it is created
    FAKE_HANG_CLOSE=1      never return from close
    FAKE_EXIT=code         end the process while AppLauncher starts
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

sys.modules["isaaclab.app"] = sys.modules[__name__]
__path__: list[str] = []


class _App:
    def close(self) -> None:
        """End the process with exit code 0, as Kit's fast shutdown does after success and after failure."""
        os._exit(0)


class AppLauncher:
    """Changes arguments, streams, signal handlers and modules as the AppLauncher of 2.3.2 does."""

    def __init__(self, launcher_args: dict | None = None, **kwargs: object) -> None:
        if "torch" in sys.modules:
            raise RuntimeError("torch was imported before AppLauncher")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signal only works in main thread of the main interpreter")
        known = {
            "headless",
            "livestream",
            "enable_cameras",
            "xr",
            "device",
            "experience",
            "rendering_mode",
            "multi_gpu",
        }
        if set(kwargs) - known:
            raise ValueError(f"unknown arguments {set(kwargs) - known}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(kwargs.get("device", "cuda:0"))):
            raise ValueError(f"Invalid value for input keyword argument `device`: {kwargs.get('device')}.")
        self._record(kwargs)
        if "FAKE_EXIT" in os.environ:
            raise SystemExit(int(os.environ["FAKE_EXIT"]))
        if len(sys.argv) > 1:  # Kit reads every remaining argument, and "-h" ends the process
            raise SystemExit(0)
        for name in [name for name in sys.modules if re.match(".*lab.*", name)]:
            sys.modules[name] = sys.modules.pop(name)
        with open(os.devnull, "w") as discarded:
            sys.stdout = discarded
            sys.argv += ["--/app/added=1"]
        sys.stdout = sys.__stdout__
        gc.disable()
        atexit.register(os._exit, 0)
        self.app = _App()
        for signum in (signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV):
            signal.signal(signum, lambda number, frame: None)
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))  # as SimulationApp does

    @staticmethod
    def _record(kwargs: dict) -> None:
        if "FAKE_RECORD" in os.environ:
            facts = {
                "argv": sys.argv,
                "kwargs": kwargs,
                "torch": "torch" in sys.modules,
                "environ": {key: os.environ.get(key) for key in ("OMNI_KIT_ACCEPT_EULA", "CUDA_VISIBLE_DEVICES")},
                "pid": os.getpid(),
            }
            with Path(os.environ["FAKE_RECORD"]).open("a") as file:
                file.write(json.dumps(facts) + "\n")
