"""The environment variables that let a process and its children see fake GPUs. See README.md."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tests.fake_gpu.build import LIBRARIES, build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


INTEGER = r"[0-9]+"
SWITCHES = {  # name -> the form of its value, see README.md
    **dict.fromkeys(("COUNT", "MEMORY_GB", "SLOW_EVENTS", "STREAM_SEED"), INTEGER),
    **dict.fromkeys(("DRIVER", "P2P", "IPC_EXPORT", "IPC_IMPORT", "HOST_REGISTER", "OPERATORS"), "[01]"),
    "CAPABILITY": rf"{INTEGER}\.{INTEGER}",
    "COMPUTE_MODE": "Default|Exclusive_Process|Prohibited",
}


def check_switches(environ: Mapping[str, str]) -> None:
    """Raise ValueError if a variable FAKE_GPU_* is unknown or has a value of the wrong form."""
    for name, value in environ.items():
        prefix, _, switch = name.partition("FAKE_GPU_")
        if prefix or not switch:
            continue
        if switch not in SWITCHES:
            known = ", ".join(sorted(f"FAKE_GPU_{known}" for known in SWITCHES))
            raise ValueError(f"{name} is no switch of the fake GPU; expected one of {known}; correct or unset it")
        if re.fullmatch(SWITCHES[switch], value) is None:
            raise ValueError(f"{name}={value!r}; expected a value of the form {SWITCHES[switch]}; correct or unset it")


def fake_gpu_environment(*, operators: bool, root: Path = ROOT) -> dict[str, str]:
    """Return what to add to a process's environment.

    operators: compute torch's operators on the CPU. Without it kernels do nothing and are counted. root: the checkout
    whose modules the process imports.
    """
    libraries = build()
    path = [str(HERE / "bin"), os.environ.get("PATH", "")]
    environment = {
        "LD_PRELOAD": ":".join(str(libraries / name) for name in ("libcuda.so.1", *LIBRARIES)),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "PATH": os.pathsep.join(path),
        # Code that Inductor compiles here can hold constants that the fake GPU computed wrongly.
        "TORCHINDUCTOR_CACHE_DIR": str(libraries / "inductor"),
    }
    if operators:
        paths = [str(HERE / "site"), str(root), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["FAKE_GPU_OPERATORS"] = "1"
    return environment
