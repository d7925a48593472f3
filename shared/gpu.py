"""Check that torch can use the GPU before anything depends on it. Torch-free at import."""

from __future__ import annotations

from shared.errors import SettingError

BFLOAT16_CAPABILITY = (8, 0)  # older GPUs only emulate bfloat16


def check_gpu(device: str, *, autocast: str = "false") -> None:
    """Use the GPU once, so that one that does not work ends the run within seconds and not after the simulator's start.

    device: a torch device; nothing happens for "cpu". autocast: the setting optimization.autocast, if it applies.
    Raises: SettingError if torch cannot use the GPU, or if the GPU has no bfloat16 although autocast needs it.
    """
    if not device.startswith("cuda"):
        return
    import torch

    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: this build of torch has no CUDA
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
        raise SettingError(
            f"torch {torch.__version__}, built {build}, cannot use the GPU {device}: {str(error).splitlines()[0]}; "
            "expected a GPU that runs a kernel; check with 'nvidia-smi' that it has free memory and that no other "
            "process uses it exclusively; otherwise update the driver or install a build of torch that fits it"
        ) from error
    torch.cuda.empty_cache()  # the replay is allocated next, in a memory segment of its own
    capability = torch.cuda.get_device_capability(device)
    if autocast == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        raise SettingError(
            f"optimization.autocast=bfloat16 on {torch.cuda.get_device_name(device)}, which has compute capability "
            f"{capability[0]}.{capability[1]}; expected 8.0 or more, because older GPUs only emulate bfloat16; set "
            "optimization.autocast=float16 or optimization.autocast=false"
        )


def describe_gpu(device: str) -> str:
    """Return the GPU's name and its unique identifier, as nvidia-smi lists them, or "cpu"."""
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} (GPU-{properties.uuid})"
