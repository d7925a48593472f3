"""The provenance of figures. Every result file has four sections.

run        benchmark, command, started, git
versions   python and the packages that matter
hardware   processor, cores, memory, GPUs, load at the start
runtime    the figures, one entry per benchmark
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launcher.provenance import git_state, package_versions
from shared.files import write_json

REPO = Path(__file__).resolve().parent.parent


def document(name: str, runtime: dict[str, Any]) -> dict[str, Any]:
    """Return a whole result file: the figures, and where they come from. It holds no absolute path."""
    module = "benchmarks" if name == "all" else f"benchmarks.{name}"
    return {
        "run": {
            "benchmark": name,
            "command": f"python -m {module} {command_line(sys.argv[1:])}".strip(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_state(REPO),
        },
        "versions": {"python": platform.python_version(), **package_versions()},
        "hardware": hardware(),
        "runtime": runtime,
    }


def hardware() -> dict[str, Any]:
    """Return the properties of this machine that figures depend on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": gpus,
        "platform": platform.platform(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def cpu_name() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def command_line(arguments: list[str]) -> str:
    """Return the arguments as one line. Absolute paths are cut to their last part, because they may be private."""
    return shlex.join([Path(argument).name if argument.startswith("/") else argument for argument in arguments])


def save(path: Path | None, content: dict[str, Any]) -> None:
    """Write a result file completely or not at all. With path None, write nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads(
            json.dumps(content)
        )  # a value that JSON cannot hold raises here, before anything is written
        write_json(path, content)
