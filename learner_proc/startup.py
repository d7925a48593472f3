"""What the learner makes once: the replay's memory, and networks that are compiled before the first real batch."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from learner_proc import checkpoint
from learner_proc.gradient_step import GradientStep
from learner_proc.replay import Replay
from shared.config import Geometry, Settings
from shared.handover import create_memfd_slab, pin_slab
from shared.stream import StreamSpec, plan_layout


def allocate_replay(
    spec: StreamSpec, settings: Settings, sizes: Geometry, *, device: torch.device
) -> tuple[Replay, int | None]:
    """The ring in the train device's memory, or in host memory with the descriptor to hand over.

    Called before anything else is put on the GPU, so that the slab's CUDA segment holds nothing but the slab.
    """
    layout = plan_layout(spec, sizes.capacity)
    fd = None
    if device.type == "cuda" and settings.replay_buffer.gpu_storage:
        slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    else:
        slab, fd = create_memfd_slab(layout.num_bytes)
        if device.type == "cuda":
            pin_slab(slab)
    replay = Replay(slab, layout, ticks_per_chunk=sizes.ticks_per_chunk, seed=settings.env.seed, device=device)
    return replay, fd


def build_gradient_step(
    spec: StreamSpec, settings: Settings, sizes: Geometry, replay: Replay, *, device: torch.device
) -> GradientStep:
    """Networks and optimisers from the run's seed, compiled by one step on a blank batch that leaves no trace."""
    torch.manual_seed(settings.env.seed)
    step = GradientStep(spec, settings, device=device)
    if settings.optimization.compile.enabled:
        snapshot, random_state = step.state_dict(), checkpoint.random_state(replay, device)
        step(blank_batch(spec, sizes, device=device))
        step.load_state_dict(snapshot)
        checkpoint.restore_random_state(random_state, replay, device)
    return step


def blank_batch(spec: StreamSpec, sizes: Geometry, *, device: torch.device) -> TensorDict:
    """A batch of the shapes to come; its values do not matter."""
    lead = (sizes.num_sequences, sizes.sequence_length)
    batch = TensorDict({"obs": TensorDict({}, lead)}, lead, device=device)
    for entry in spec.fields():
        batch[entry.key] = torch.zeros(*lead, *entry.shape, dtype=getattr(torch, entry.dtype), device=device)
    return batch
