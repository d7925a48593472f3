"""The GPUs of this machine, which process gets which, and the environment variables of each process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from shared.errors import SettingError
from shared.lifetime import LAUNCH_PID, SIM_GPU_INDEX

NO_GPU = "no GPU found: simulator and learner both run on the CPU"
SLOW_FLOAT16 = (
    "optimization.autocast=float16 on the CPU is many times slower than float32, because most CPUs have no float16 "
    "products: set optimization.autocast=false"
)
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # one exists if the kernel has an NVIDIA GPU (dxg: WSL)
MPS_FOLDER = "/tmp/nvidia-mps"  # the default of CUDA_MPS_PIPE_DIRECTORY
# The name comes last, because it may contain commas.
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,compute_mode,name", "--format=csv,noheader"]
_ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it."""

    index: int  # in PCI order; -1 for a slice of a GPU (MIG)
    uuid: str
    name: str
    compute_mode: str = "Default"  # "Exclusive_Process": one process only; "Prohibited": none

    @property
    def is_slice(self) -> bool:
        """Return whether this is a slice of a GPU (MIG)."""
        return self.uuid.startswith("MIG-")


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

    @property
    def are_two_slices(self) -> bool:
        """Return whether both processes have a slice of a GPU (MIG) of their own. A process can only use one slice."""
        if self.sim is None or self.train is None:
            return False
        return self.sim != self.train and self.sim.is_slice and self.train.is_slice

    def names(self) -> dict[str, str]:
        """Return the device of "sim" and of "train", for people."""
        roles = (("sim", self.sim), ("train", self.train))
        return {role: f"{gpu.name} ({gpu.uuid})" if gpu else "cpu" for role, gpu in roles}


def find_devices(
    *,
    sim: int | None,
    train: int | None,
    autocast: str,
    gpu_storage: bool,
    environ: Mapping[str, str],
    device_files: Sequence[str] = DEVICE_FILES,
) -> Devices:
    """Return the devices for the options --sim-gpu and --train-gpu on this machine, with notes for the user.

    gpu_storage: whether the replay is to be in the memory of the train GPU. device_files: one of these exists if the
    kernel has a GPU, even if nvidia-smi cannot list it.
    Raises: SettingError if an option or CUDA_VISIBLE_DEVICES names a GPU that does not exist or that cannot be used
    by both processes, or if an option names a GPU and there is none.
    """
    gpus, notes = list_gpus()
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible_gpus(gpus, mask)
    if not visible and (sim, train) != (None, None):
        given = (("--sim-gpu", sim), ("--train-gpu", train))
        named = " ".join(f"{flag} {index}" for flag, index in given if index is not None)
        _refuse_cpu(named, gpus, mask, notes, device_files)
    chosen = choose_devices(visible, sim=sim, train=train)
    check_shared_use(chosen, gpu_storage=gpu_storage)
    hints = (*precision_notes(chosen, autocast), *order_notes(chosen, gpus, environ), *mps_notes(chosen, environ))
    return Devices(chosen.sim, chosen.train, notes + chosen.notes + hints)


def _refuse_cpu(
    named: str, gpus: list[Gpu], mask: str | None, notes: tuple[str, ...], device_files: Sequence[str]
) -> NoReturn:
    """Raise SettingError, because an option (`named`, with its value) asks for a GPU and the run would use the CPU."""
    if gpus:
        raise SettingError(
            f"{named} asks for a GPU, but CUDA_VISIBLE_DEVICES={mask!r} hides every GPU; expected at "
            "least one visible GPU; unset CUDA_VISIBLE_DEVICES, or leave out both options to train on the CPU"
        )
    found = [f"{path} exists" for path in device_files if Path(path).exists()]
    if found or notes:  # a nvidia-smi that fails is a machine whose driver does not work
        reason = notes[0] if notes else f"there is no nvidia-smi, but {found[0]}"
        raise SettingError(
            f"{named} asks for a GPU, but the GPUs cannot be listed: {reason}; expected nvidia-smi to "
            "list them; repair the driver or install its tools (in a container: the driver capabilities "
            "'compute,utility'), or leave out both options to train on the CPU"
        )
    raise SettingError(
        f"{named} asks for a GPU, but this machine has none that nvidia-smi lists; expected at least one "
        "GPU; leave out both options to train on the CPU"
    )


def list_gpus() -> tuple[list[Gpu], tuple[str, ...]]:
    """Return every GPU of the machine in PCI order, and notes about what nvidia-smi could not tell."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], ()
    except (OSError, subprocess.SubprocessError) as error:
        return [], (f"nvidia-smi could not list the GPUs: {error}",)
    if answer.returncode != 0:
        text = " ".join((answer.stdout + answer.stderr).split())
        return [], (f"nvidia-smi found no usable GPU (exit code {answer.returncode}): {text:.200}",)
    found = [(line.strip(), _parse_gpu(line)) for line in answer.stdout.splitlines() if line.strip()]
    unclear = tuple(
        f"nvidia-smi does not describe one GPU; it is left out: {line:.200}" for line, gpu in found if not gpu
    )
    return [gpu for _, gpu in found if gpu], unclear


def _parse_gpu(line: str) -> Gpu | None:
    """Return the GPU that a line of nvidia-smi describes, or None: a broken GPU gives a line of another form."""
    parts = [part.strip() for part in line.split(",", 3)]
    if len(parts) < 4 or not parts[0].isdecimal() or not parts[1].startswith("GPU-"):
        return None
    index, uuid, compute_mode, name = parts
    return Gpu(int(index), uuid, name, compute_mode)


def choose_torch_device(given: str | None) -> str:
    """Return the torch device of a single process: the one that --device names, else the first GPU, else the CPU.

    Raises: SettingError if this machine has no such device, or if CUDA_VISIBLE_DEVICES names a GPU that does not exist.
    """
    gpus = visible_gpus(list_gpus()[0], os.environ.get("CUDA_VISIBLE_DEVICES"))
    devices = [*(f"cuda:{index}" for index in range(len(gpus))), "cpu"]
    if given is not None and given not in devices:
        raise SettingError(
            f"--device {given} is not a device of this machine; expected one of {', '.join(devices)}; leave it out to "
            f"use {devices[0]}, or look at the GPUs that 'nvidia-smi -L' lists"
        )
    return given or devices[0]


def visible_gpus(gpus: list[Gpu], mask: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES, given as `mask`, leaves visible, in its order.

    An entry of the mask is an index, a UUID or the beginning of a UUID.
    Raises: SettingError if an entry names no GPU of this machine.
    """
    if mask is None or not gpus:
        return gpus
    entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
    # CUDA hides the first of these entries and everything after it.
    return [_find(gpus, entry) for entry in takewhile(lambda entry: entry not in ("-1", "NoDevFiles"), entries)]


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
    if not gpus:
        return Devices(None, None, (NO_GPU,))
    for flag, index in (("--sim-gpu", sim), ("--train-gpu", train)):
        if index is not None and not 0 <= index < len(gpus):
            raise SettingError(
                f"{flag} {index} is not a visible GPU; expected an index from 0 to {len(gpus) - 1}; correct it: it "
                "counts the GPUs of CUDA_VISIBLE_DEVICES if that is set, otherwise those of 'nvidia-smi -L'"
            )
    if sim is None:
        sim = 1 if train == 0 and len(gpus) > 1 else 0
    if train is None:
        train = next((index for index in (1, 0) if index != sim and index < len(gpus)), sim)
    return Devices(gpus[sim], gpus[train])


def check_shared_use(devices: Devices, *, gpu_storage: bool) -> None:
    """Check that the chosen GPUs can be used by the processes that need them.

    The collector also opens the train GPU if the replay is there, or if both processes use the same GPU.
    Raises: SettingError if a GPU accepts too few processes, or if two slices of a GPU (MIG) should share memory.
    """
    if devices.sim is None or devices.train is None:
        return
    shared = gpu_storage or devices.sim == devices.train
    for gpu in dict.fromkeys((devices.sim, devices.train)):
        exclusive = gpu.compute_mode.startswith("Exclusive") and gpu == devices.train and shared
        if exclusive or gpu.compute_mode == "Prohibited":
            reason = "both processes use this GPU" if exclusive else "no process can use it in this mode"
            other = ", or set replay_buffer.gpu_storage=false" if exclusive and devices.sim != devices.train else ""
            raise SettingError(
                f"GPU {gpu.index} ({gpu.name}) has the compute mode {gpu.compute_mode}; expected Default, because "
                f"{reason}; run: sudo nvidia-smi -i {gpu.index} -c DEFAULT{other}"
            )
    if shared and devices.are_two_slices:
        raise SettingError(
            f"the simulator's and the learner's GPU are two slices (MIG): {devices.sim.uuid} and {devices.train.uuid}; "
            "expected one slice, because CUDA shows a process only one; let both options name the same slice, set "
            "replay_buffer.gpu_storage=false, or give whole GPUs in CUDA_VISIBLE_DEVICES"
        )


def order_notes(devices: Devices, gpus: list[Gpu], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note if a number in CUDA_VISIBLE_DEVICES may mean another GPU for other programs.

    This project counts GPUs in PCI order, as nvidia-smi does. CUDA's own default is the fastest GPU first.
    """
    numbered = any(entry.strip().isdecimal() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    mixed = len({gpu.name for gpu in gpus}) > 1
    if devices.train is None or not (numbered and mixed) or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return ()
    return (
        "CUDA_VISIBLE_DEVICES is read in the order of nvidia-smi; CUDA itself counts the fastest GPU first unless "
        "CUDA_DEVICE_ORDER=PCI_BUS_ID is set, so check below that these are the GPUs you meant",
    )


def mps_notes(devices: Devices, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note if NVIDIA's Multi-Process Service runs: a killed collector can then end the learner too."""
    folder = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_FOLDER))
    if devices.train is None or not (folder / "control").exists():
        return ()
    return (
        f"NVIDIA's Multi-Process Service runs ({folder}): when a collector is killed, it may end the learner as well; "
        "for long runs stop it with: echo quit | nvidia-cuda-mps-control",
    )


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
    if role == "collector" and devices.are_two_slices:
        uuids = [devices.sim.uuid]
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
