"""Which GPUs this machine offers, which process gets which, and the environment each child starts in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingError
from shared.lifetime import LAUNCH_PID, SIM_GPU_INDEX

NO_GPU = "no GPU found: simulator and learner both run on the CPU"
SLOW_FLOAT16 = (
    "optimization.autocast=float16 on the CPU is many times slower than float32, as most CPUs have no float16 products: "
    "set optimization.autocast=false"
)
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
_ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Gpu:
    index: int  # as nvidia-smi counts, in PCI order
    uuid: str
    name: str


@dataclass(frozen=True)
class Devices:
    """The simulator's and the learner's GPU, or None twice for the CPU; notes for the user."""

    sim: Gpu | None
    train: Gpu | None
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The device both processes are told; each sees its own GPU first."""
        return "cpu" if self.train is None else "cuda:0"

    def names(self) -> dict[str, str]:
        return {role: f"{gpu.name} ({gpu.uuid})" if gpu else "cpu" for role, gpu in self._roles()}

    def _roles(self) -> list[tuple[str, Gpu | None]]:
        return [("sim", self.sim), ("train", self.train)]


def list_gpus() -> tuple[list[Gpu], tuple[str, ...]]:
    """Every GPU of the machine in PCI order, and a note if nvidia-smi is there but fails."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], ()
    except (OSError, subprocess.SubprocessError) as error:
        return [], (f"nvidia-smi could not be asked for GPUs: {error}",)
    if answer.returncode != 0:
        text = " ".join((answer.stdout + answer.stderr).split())
        return [], (f"nvidia-smi found no usable GPU (exit {answer.returncode}): {text:.200}",)
    rows = [[part.strip() for part in line.split(",", 2)] for line in answer.stdout.splitlines() if line.strip()]
    return [Gpu(int(index), uuid, name) for index, uuid, name in rows], ()


def visible_gpus(gpus: list[Gpu], mask: str | None) -> list[Gpu]:
    """The GPUs an outer CUDA_VISIBLE_DEVICES leaves, in its order; its entries are indices, UUIDs or their beginnings.

    Raises: SettingError on an entry that names no GPU of this machine.
    """
    if mask is None or not gpus:
        return gpus
    entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
    if any(entry in ("-1", "NoDevFiles") for entry in entries):
        # CUDA hides this entry and everything after it.
        entries = entries[: min(entries.index(entry) for entry in ("-1", "NoDevFiles") if entry in entries)]
    return [_find(gpus, entry) for entry in entries]


def _find(gpus: list[Gpu], entry: str) -> Gpu:
    if entry.startswith("MIG-"):  # a slice of a GPU has a UUID of its own, which nvidia-smi's GPU list leaves out
        return Gpu(-1, entry, "MIG device")
    for gpu in gpus:
        if entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry)):
            return gpu
    raise SettingError(
        f"CUDA_VISIBLE_DEVICES names {entry!r}, which is no GPU of this machine; wanted an index from 0 to "
        f"{len(gpus) - 1} or a UUID from 'nvidia-smi -L'; mend or unset it"
    )


def choose_devices(gpus: list[Gpu], *, sim: int | None, train: int | None) -> Devices:
    """Simulator on the first GPU and learner on another unless told otherwise; one GPU serves both; none: the CPU.

    Raises: SettingError if an index is negative or beyond the visible GPUs.
    """
    for flag, index in (("--sim-gpu", sim), ("--train-gpu", train)):
        if index is not None and (index < 0 or (gpus and index >= len(gpus))):
            seen = f"from 0 to {len(gpus) - 1}" if gpus else "of 0 or more"
            raise SettingError(f"{flag} {index} is no visible GPU; wanted an index {seen}; see 'nvidia-smi -L'")
    if not gpus:
        return Devices(None, None, (NO_GPU,))
    if sim is None:
        sim = 1 if train == 0 and len(gpus) > 1 else 0
    if train is None:
        train = next((index for index in (1, 0) if index != sim and index < len(gpus)), sim)
    return Devices(gpus[sim], gpus[train])


def precision_notes(devices: Devices, autocast: str) -> tuple[str, ...]:
    """A note where the precision of matrix products is one that the learner's device computes at a crawl."""
    return (SLOW_FLOAT16,) if devices.train is None and autocast == "float16" else ()


def child_environment(role: str, devices: Devices, outer: Mapping[str, str], *, repo: Path) -> dict[str, str]:
    """The environment of "collector" or "learner": its GPUs in order, the allocator's mode, its threads.

    The collector sees the simulator's GPU first and the learner's second, because simulators insist on cuda:0.
    """
    env = dict(outer)
    env[LAUNCH_PID] = str(os.getpid())
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(repo), outer.get("PYTHONPATH", "")) if part)
    if devices.sim is None or devices.train is None:
        cores = len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", "1" if role == "collector" else str(max(1, cores - 1)))
        return env
    uuids = [devices.train.uuid]
    if role == "collector":
        uuids = list(dict.fromkeys((devices.sim.uuid, devices.train.uuid)))
    env["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if devices.sim.index >= 0:
        env.setdefault(
            "MUJOCO_EGL_DEVICE_ID", str(devices.sim.index)
        )  # EGL sees every GPU, whatever the mask above says
        env[SIM_GPU_INDEX] = str(devices.sim.index)  # and so does Isaac's renderer
    conf = allocator_conf(outer)
    return env | dict.fromkeys(_ALLOCATOR_KEYS, conf)


def allocator_conf(outer: Mapping[str, str]) -> str:
    """The user's allocator settings without expandable segments, which cannot be shared between processes.

    Both spellings get the same text: newer torch reads PYTORCH_ALLOC_CONF only and older torch only the other one.
    """
    given = next((outer[key] for key in _ALLOCATOR_KEYS if outer.get(key)), "")
    kept = [part.strip() for part in given.split(",") if part.strip() and "expandable_segments" not in part]
    return ",".join([*kept, "expandable_segments:False"])
