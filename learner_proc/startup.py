"""What the learner makes once: the memory of the replay, and networks that are compiled before training."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict

from learner_proc import checkpoint
from learner_proc.captured_step import CapturedStep, SampledStep, Update
from learner_proc.gradient_step import GradientStep
from learner_proc.measurements import CapturedMeasurements, Measurements
from learner_proc.replay import Replay
from learner_proc.replay_files import load_replay
from shared.compose import load_settings
from shared.config import Settings
from shared.errors import SettingError
from shared.evaluation import EvaluationPlan
from shared.geometry import Geometry
from shared.handover import create_memfd_slab, pin_slab
from shared.memory import total_bytes
from shared.stream import StreamSpec, plan_layout

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # numbers of options in malloc.h


def allocate_replay(
    spec: StreamSpec, settings: Settings, geometry: Geometry, *, device: torch.device, on_gpu: bool = True
) -> tuple[Replay, int | None]:
    """Return an empty replay, and the descriptor of its memory file if it is in host memory, else None.

    on_gpu: put it on `device` if that is a GPU; otherwise it is in host memory, which is pinned for a GPU.
    Call it before anything else is allocated on the GPU, so that the slab has a segment of GPU memory of its own.
    Raises: SettingError if it is larger than the memory of this machine or GPU.
    """
    layout = plan_layout(spec, geometry.capacity)
    fd = None
    if device.type == "cuda" and on_gpu:
        _check_memory(layout.num_bytes, torch.cuda.mem_get_info(device)[1], settings, "GPU")
        slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    else:
        _check_memory(layout.num_bytes, total_bytes(), settings, "host")
        slab, fd = create_memfd_slab(layout.num_bytes)
        if device.type == "cuda":
            pin_slab(slab)
    plan = EvaluationPlan.of(settings.collector, spec.num_envs)
    replay = Replay(
        slab,
        layout,
        ticks_per_chunk=geometry.ticks_per_chunk,
        seed=settings.env.seed,
        device=device,
        columns=None if settings.collector.eval_in_replay else plan.training_columns(spec.num_envs),
        max_deviation=settings.replay_buffer.max_deviation,
    )
    return replay, fd


def _check_memory(num_bytes: int, total: int | None, settings: Settings, kind: str) -> None:
    """Raise SettingError if a replay of this size can never fit: the kernel would only notice it when rows arrive."""
    if total is not None and num_bytes > total:
        size = settings.replay_buffer.buffer_size
        half = size * total // num_bytes // 2
        raise SettingError(
            f"replay_buffer.buffer_size={size} takes {num_bytes / 1e9:.1f} GB of {kind} memory, and this machine has "
            f"{total / 1e9:.1f} GB; expected a replay that fits; set replay_buffer.buffer_size={half}"
        )


def build_gradient_step(spec: StreamSpec, settings: Settings, *, device: torch.device) -> GradientStep:
    """Return networks and optimisers, initialised from the seed of the run."""
    torch.manual_seed(settings.env.seed)
    return GradientStep(spec, settings, device=device)


def build_step(
    step: GradientStep, replay: Replay, settings: Settings, geometry: Geometry, *, device: torch.device
) -> Update:
    """Return the function that the loop calls for one gradient step: compiled and captured as the settings choose.

    Compiling and capturing run a few steps. Afterwards, parameters and random states are restored.
    """
    options = settings.optimization.compile
    shape = {"num_sequences": geometry.num_sequences, "length": geometry.sequence_length}
    captured = device.type == "cuda" and options.cudagraphs
    if not (captured or options.enabled):
        return SampledStep(step, replay, **shape)
    snapshot, random_state = step.state_dict(), checkpoint.random_state(replay, device)
    blank = blank_batch(step.spec, geometry.num_sequences, geometry.sequence_length, device=device)
    if captured:
        update: Update = CapturedStep(step, replay, **shape, blank=blank)
    else:
        update = SampledStep(step, replay, **shape)
        step(blank)
    step.load_state_dict(snapshot)
    checkpoint.restore_random_state(random_state, replay, device)
    return update


def open_run(run_dir: Path) -> tuple[Settings, GradientStep, Replay]:
    """Return settings, networks and replay of a run's newest checkpoint, on the CPU. The run is not changed.

    Raises: SettingError if the run has no checkpoint with a replay.
    """
    settings = load_settings(run_dir / "config.yaml")
    settings.optimization.compile.enabled = False
    (saved, state), device = checkpoint.load_newest(run_dir / "checkpoints"), torch.device("cpu")
    spec = checkpoint.stream_spec(saved)
    geometry = Geometry.of(settings, spec.num_envs)
    replay, _ = allocate_replay(spec, settings, geometry, device=device)
    load_replay(saved, replay, spec_digest=spec.digest())
    step = build_gradient_step(spec, settings, device=device)
    step.load_state_dict(state["gradient_step"])
    return settings, step, replay


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process instead of returning it to the kernel.

    A gradient step on the CPU frees and allocates the same large blocks each time. The kernel has to map and zero every
    page of a new block, which took 14 % of a step of 500 frames.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    # Older versions of glibc accept at most 32 MB. The other two options have no effect without this one.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 256 << 20)


def build_measurements(step: GradientStep, replay: Replay, settings: Settings, *, device: torch.device) -> Measurements:
    """Return what measures the numbers of a row of metrics.jsonl, captured if gradient steps are captured too."""
    if not (device.type == "cuda" and settings.optimization.compile.cudagraphs):
        return Measurements(step, replay, settings.optimization)
    blank = partial(blank_batch, step.spec, device=device)
    return CapturedMeasurements(step, replay, settings.optimization, blank=blank)


def blank_batch(spec: StreamSpec, num_sequences: int, length: int, *, device: torch.device) -> TensorDict:
    """Return a batch of zeros that has the shapes of real batches."""
    lead = (num_sequences, length)
    batch = TensorDict({"obs": TensorDict({}, lead)}, lead, device=device)
    for entry in spec.fields():
        batch[entry.key] = torch.zeros(*lead, *entry.shape, dtype=getattr(torch, entry.dtype), device=device)
    return batch
