"""The steps whose kernels and memory `benchmarks.counts` counts."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config as inductor

from benchmarks.counters import count_kernels, count_traffic, counted_captures, is_fake, memory_mb
from benchmarks.step_cases import ACTION_DIM, OBS_DIM, OBS_NAME, forget_compiled, settings_for, synthetic_batch
from learner_proc.measurements import Measurements
from learner_proc.replay import Replay
from learner_proc.startup import allocate_replay, build_gradient_step, build_step
from shared.compose import compose
from shared.config import Settings
from shared.geometry import Geometry
from shared.stream import ObsSpec, StreamSpec

LAMBDA_RETURN = "torchrl.objectives.value.functional._fast_td_lambda_return_estimate"
DEVICE = torch.device("cuda:0")
CALLS = 3  # updates after the warm-up whose traffic is counted
STATE_ENVS, TICKS, ROWS = 64, 50, 2000  # the replay of `count_step`
IMAGE = {"pixels": ObsSpec((64, 64, 3), "uint8")}


def _vector(size: int) -> dict[str, ObsSpec]:
    return {"policy": ObsSpec((size,), "float32")}


# What the simulator of each file in configs/ streams: observations and the size of an action.
PRESETS: dict[str, tuple[dict[str, ObsSpec], int]] = {
    "dm_control": (IMAGE, 6),
    "gym": (_vector(3), 1),
    "isaaclab": (_vector(48), 12),
    "isaaclab_ant": (_vector(60), 8),
    "isaaclab_camera": (IMAGE, 1),
    "isaaclab_cartpole": (_vector(4), 1),
    "mjlab": (_vector(48), 12),
    "mjlab_cartpole": (_vector(5), 1),
    "quickstart": (_vector(3), 1),
    "quickstart_dmc": (_vector(5), 1),
    "robust": (_vector(24), 6),
    "v1": (IMAGE, 6),
}


def count_step(frames: int, *, compiled: bool) -> dict[str, float]:
    """Return the figures of our captured step with the sizes of TorchRL's recipe, and of a row of metrics."""
    settings = settings_for(frames, precision="bfloat16", compiled=compiled)
    spec = StreamSpec(STATE_ENVS, {OBS_NAME: ObsSpec((OBS_DIM,), "float32")}, ACTION_DIM)
    geometry = Geometry(STATE_ENVS, STATE_ENVS, TICKS, ROWS, 2, frames // settings.replay_buffer.batch_length, TICKS)
    learner = _Learner(spec, settings, geometry)
    measured = learner.figures()
    measured["kernels_of_a_row"] = _total(count_kernels(learner.measure))
    return measured


def count_preset(name: str, *, compiled: bool) -> dict[str, float]:
    """Return the figures of the captured step of a file in configs/, with a replay of its full size.

    compiled: whether to compile if the preset compiles; otherwise nothing is compiled.
    """
    settings, (obs, action_dim) = compose(name), PRESETS[name]
    settings.optimization.compile.enabled &= compiled
    geometry = Geometry.of(settings)
    return _Learner(StreamSpec(geometry.num_envs, obs, action_dim), settings, geometry).figures()


def count_torchrl(frames: int, *, compiled: bool) -> dict[str, float]:
    """Return the figures of TorchRL's update in bfloat16. compiled: with its fastest mode, otherwise eager.

    TorchRL computes the lambda-return from tensors whose shapes depend on where episodes end. The fake GPU computes no
    values, so there the return is replaced by its first term. The figures are then lower limits.
    """
    from benchmarks.torchrl_update import EAGER_CALLS, OURS, TorchRLUpdate, to_torchrl

    _start_afresh()
    mode = "rssm+losses" if compiled else "eager"
    update = TorchRLUpdate(OURS, precision="bfloat16", mode=mode, device=DEVICE)
    batch = to_torchrl(synthetic_batch(frames, device=DEVICE), OURS)
    with patch(LAMBDA_RETURN, _first_term) if is_fake() else contextlib.nullcontext():
        for _ in range(EAGER_CALLS + 2):
            update(batch)
        # The fewest: its compiled parts may still compile in later calls, which launches kernels to time them.
        found = min((count_kernels(lambda: update(batch)) for _ in range(CALLS)), key=_total)
        return _named(found) | count_traffic(lambda: update(batch), calls=CALLS) | memory_mb()


def _first_term(*, gamma: Tensor, next_state_value: Tensor, reward: Tensor, **_: Any) -> Tensor:
    return reward + gamma * next_state_value


class _Learner:
    """A gradient step that is captured on a replay, whose rows have no values."""

    def __init__(self, spec: StreamSpec, settings: Settings, geometry: Geometry) -> None:
        _start_afresh()
        self._spec = spec
        self.replay, _ = allocate_replay(spec, settings, geometry, device=DEVICE)
        _fill(self.replay)
        step = build_gradient_step(spec, settings, device=DEVICE)
        measurements = Measurements(step, self.replay, settings.optimization)
        self.measure = lambda: measurements(seed=0)
        with counted_captures() as captured:
            self.update = build_step(step, self.replay, settings, geometry, device=DEVICE)
        self._captured = captured

    def figures(self) -> dict[str, float]:
        """Return kernels of the graph, what an update costs beside them, and the memory."""
        self.update()
        # A real GPU counts kernels where they run, the fake one where they are captured.
        found = _named(self._captured[-1] if is_fake() else count_kernels(self.update))
        if is_fake() and any(entry.is_image for entry in self._spec.obs.values()):
            found = {}  # without cuDNN, each image of a batch has kernels of its own
        return found | count_traffic(self.update, calls=CALLS) | memory_mb()


def _fill(replay: Replay) -> None:
    """Make all rows that are not granted available for sampling. They keep the zeros of a new slab."""
    chunks = replay.layout.capacity // replay.ticks_per_chunk
    for _ in range(chunks - 2):
        replay.commit(replay.grant())


def _named(found: Counter[str]) -> dict[str, float]:
    return {"kernels": _total(found), **{f"kernels_{kind}": count for kind, count in sorted(found.items())}}


def _total(found: Counter[str]) -> int:
    return sum(found.values())


def _start_afresh() -> None:
    """Free what the last case left, so that the memory of each case is its own."""
    forget_compiled()
    torch.cuda.reset_peak_memory_stats()
    if is_fake():
        torch.backends.cudnn.enabled = False  # cuDNN cannot start without a GPU
        # The compiler computes constants on the device, and the fake one computes nothing. Without this pass, a few
        # more kernels are counted than a GPU has.
        inductor.joint_graph_constant_folding = False
