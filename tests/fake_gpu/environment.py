"""The environment variables that let a process and its children see fake GPUs. See README.md."""

from __future__ import annotations

import os
from pathlib import Path

from tests.fake_gpu.build import LIBRARIES, build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


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
