"""What the learner makes once: the replay's memory, and networks that are compiled before the first real batch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from tensordict import TensorDict

from learner_proc import checkpoint
from learner_proc.captured_step import CapturedStep, SampledStep, Update
from learner_proc.gradient_step import GradientStep
from learner_proc.replay import Replay
from shared.compose import load_settings
from shared.config import Settings
from shared.geometry import Geometry
from shared.handover import create_memfd_slab, pin_slab
from shared.stream import StreamSpec, plan_layout

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def allocate_replay(
    spec: StreamSpec, settings: Settings, geometry: Geometry, *, device: torch.device
) -> tuple[Replay, int | None]:
    """The ring in the train device's memory, or in host memory with the descriptor to hand over.

    Called before anything else is put on the GPU, so that the slab's CUDA segment holds nothing but the slab.
    """
    layout = plan_layout(spec, geometry.capacity)
    fd = None
    if device.type == "cuda" and settings.replay_buffer.gpu_storage:
        slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    else:
        slab, fd = create_memfd_slab(layout.num_bytes)
        if device.type == "cuda":
            pin_slab(slab)
    replay = Replay(slab, layout, ticks_per_chunk=geometry.ticks_per_chunk, seed=settings.env.seed, device=device)
    return replay, fd


def build_gradient_step(spec: StreamSpec, settings: Settings, *, device: torch.device) -> GradientStep:
    """Networks and optimisers from the run's seed."""
    torch.manual_seed(settings.env.seed)
    return GradientStep(spec, settings, device=device)


def build_step(
    step: GradientStep, replay: Replay, settings: Settings, geometry: Geometry, *, device: torch.device
) -> Update:
    """What the loop calls: compiled and captured as the settings say, by steps that leave no trace."""
    options = settings.optimization.compile
    shape = {"num_sequences": geometry.num_sequences, "length": geometry.sequence_length}
    captured = device.type == "cuda" and options.cudagraphs
    if not (captured or options.enabled):
        return SampledStep(step, replay, **shape)
    snapshot, random_state = step.state_dict(), checkpoint.random_state(replay, device)
    blank = blank_batch(step.spec, geometry, device=device)
    if captured:
        update: Update = CapturedStep(step, replay, **shape, blank=blank)
    else:
        update = SampledStep(step, replay, **shape)
        step(blank)
    step.load_state_dict(snapshot)
    checkpoint.restore_random_state(random_state, replay, device)
    return update


def open_run(run_dir: Path) -> tuple[Settings, GradientStep, Replay]:
    """Networks and replay of a run's newest checkpoint on the CPU, to look at; nothing of the run is changed.

    Raises: SettingError if the run has no checkpoint with a replay.
    """
    settings = load_settings(run_dir / "config.yaml")
    settings.optimization.compile.enabled = False
    folder, device = checkpoint.newest(run_dir / "checkpoints"), torch.device("cpu")
    spec = checkpoint.stream_spec(folder)
    geometry = Geometry.of(settings, spec.num_envs)
    replay, _ = allocate_replay(spec, settings, geometry, device=device)
    checkpoint.load_replay(folder, replay, spec_digest=spec.digest())
    step = build_gradient_step(spec, settings, device=device)
    step.load_state_dict(checkpoint.load_state(folder)["gradient_step"])
    return settings, step, replay


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a gradient step on the CPU frees and asks for the same large blocks every time.

    Handed back, each of them is mapped and zeroed page by page again; at 500 frames that was 14 % of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    # older ones refuse more than 32 MB; the others only help once the first is taken
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 256 << 20)


def blank_batch(spec: StreamSpec, geometry: Geometry, *, device: torch.device) -> TensorDict:
    """A batch of the shapes to come; its values do not matter."""
    lead = (geometry.num_sequences, geometry.sequence_length)
    batch = TensorDict({"obs": TensorDict({}, lead)}, lead, device=device)
    for entry in spec.fields():
        batch[entry.key] = torch.zeros(*lead, *entry.shape, dtype=getattr(torch, entry.dtype), device=device)
    return batch
