"""The GPUs of this machine, which process gets which, and the environment variables of each process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import SettingError
from shared.lifetime import LAUNCH_PID, SIM_GPU_INDEX

NO_GPU = "no GPU found: simulator and learner both run on the CPU"
SLOW_FLOAT16 = (
    "optimization.autocast=float16 on the CPU is many times slower than float32, because most CPUs have no float16 "
    "products: set optimization.autocast=false"
)
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
_ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it."""

    index: int  # in PCI order; -1 for a slice of a GPU (MIG)
    uuid: str
    name: str


@dataclass(frozen=True)
class Devices:
    """The GPU of the simulator and that of the learner, or None for both: the CPU. `notes` are lines for the user."""

    sim: Gpu | None
    train: Gpu | None
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The torch device that both processes use; on a GPU machine, each process sees its own GPU first."""
        return "cpu" if self.train is None else "cuda:0"

    def names(self) -> dict[str, str]:
        """Return the device of "sim" and of "train", for people."""
        roles = (("sim", self.sim), ("train", self.train))
        return {role: f"{gpu.name} ({gpu.uuid})" if gpu else "cpu" for role, gpu in roles}


def find_devices(*, sim: int | None, train: int | None, autocast: str, environ: Mapping[str, str]) -> Devices:
    """Return the devices for the options --sim-gpu and --train-gpu on this machine, with notes for the user.

    Raises: SettingError if an option or CUDA_VISIBLE_DEVICES names a GPU that does not exist.
    """
    gpus, notes = list_gpus()
    chosen = choose_devices(visible_gpus(gpus, environ.get("CUDA_VISIBLE_DEVICES")), sim=sim, train=train)
    return Devices(chosen.sim, chosen.train, notes + chosen.notes + precision_notes(chosen, autocast))


def list_gpus() -> tuple[list[Gpu], tuple[str, ...]]:
    """Return every GPU of the machine in PCI order, and a note if nvidia-smi exists but fails."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], ()
    except (OSError, subprocess.SubprocessError) as error:
        return [], (f"nvidia-smi could not list the GPUs: {error}",)
    if answer.returncode != 0:
        text = " ".join((answer.stdout + answer.stderr).split())
        return [], (f"nvidia-smi found no usable GPU (exit code {answer.returncode}): {text:.200}",)
    rows = [[part.strip() for part in line.split(",", 2)] for line in answer.stdout.splitlines() if line.strip()]
    return [Gpu(int(index), uuid, name) for index, uuid, name in rows], ()


def visible_gpus(gpus: list[Gpu], mask: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES, given as `mask`, leaves visible, in its order.

    An entry of the mask is an index, a UUID or the beginning of a UUID.
    Raises: SettingError if an entry names no GPU of this machine.
    """
    if mask is None or not gpus:
        return gpus
    entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
    if any(entry in ("-1", "NoDevFiles") for entry in entries):
        # CUDA hides this entry and everything after it.
        entries = entries[: min(entries.index(entry) for entry in ("-1", "NoDevFiles") if entry in entries)]
    return [_find(gpus, entry) for entry in entries]


def _find(gpus: list[Gpu], entry: str) -> Gpu:
    if entry.startswith("MIG-"):  # a slice of a GPU has its own UUID, which nvidia-smi's list of GPUs does not show
        return Gpu(-1, entry, "MIG device")
    for gpu in gpus:
        if entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry)):
            return gpu
    raise SettingError(
        f"CUDA_VISIBLE_DEVICES lists {entry!r}, which is not a GPU of this machine; expected an index from 0 to "
        f"{len(gpus) - 1} or a UUID that 'nvidia-smi -L' prints; correct or unset it"
    )


def choose_devices(gpus: list[Gpu], *, sim: int | None, train: int | None) -> Devices:
    """Return the devices of both processes for the options --sim-gpu and --train-gpu; None means not given.

    By default the simulator gets the first GPU and the learner another one. A single GPU serves both.
    Raises: SettingError if an index is negative or beyond the visible GPUs.
    """
    for flag, index in (("--sim-gpu", sim), ("--train-gpu", train)):
        if index is not None and (index < 0 or (gpus and index >= len(gpus))):
            valid = f"from 0 to {len(gpus) - 1}" if gpus else "of 0 or more"
            raise SettingError(f"{flag} {index} is not a visible GPU; expected an index {valid}; see 'nvidia-smi -L'")
    if not gpus:
        return Devices(None, None, (NO_GPU,))
    if sim is None:
        sim = 1 if train == 0 and len(gpus) > 1 else 0
    if train is None:
        train = next((index for index in (1, 0) if index != sim and index < len(gpus)), sim)
    return Devices(gpus[sim], gpus[train])


def precision_notes(devices: Devices, autocast: str) -> tuple[str, ...]:
    """Return a note if the learner's device is very slow at the chosen precision of matrix products."""
    return (SLOW_FLOAT16,) if devices.train is None and autocast == "float16" else ()


def child_environment(role: str, devices: Devices, outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of "collector" or "learner": its GPUs in order, the memory allocator's mode, its threads.

    The collector sees the simulator's GPU first and the learner's second, because simulators always use cuda:0.
    """
    env = dict(outer)
    env[LAUNCH_PID] = str(os.getpid())
    env["PYTHONUNBUFFERED"] = "1"
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
        # EGL and Isaac's renderer ignore CUDA_VISIBLE_DEVICES: they need the index among all GPUs.
        env.setdefault("MUJOCO_EGL_DEVICE_ID", str(devices.sim.index))
        env[SIM_GPU_INDEX] = str(devices.sim.index)
    conf = allocator_conf(outer)
    return env | dict.fromkeys(_ALLOCATOR_KEYS, conf)


def allocator_conf(outer: Mapping[str, str]) -> str:
    """Return the user's settings of torch's allocator, but with expandable segments off.

    Memory in expandable segments cannot be shared between processes. Newer versions of torch read PYTORCH_ALLOC_CONF,
    older ones PYTORCH_CUDA_ALLOC_CONF; both get the same text.
    """
    given = next((outer[key] for key in _ALLOCATOR_KEYS if outer.get(key)), "")
    kept = [part.strip() for part in given.split(",") if part.strip() and "expandable_segments" not in part]
    return ",".join([*kept, "expandable_segments:False"])
