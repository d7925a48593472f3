"""The problem of all gradient-step benchmarks: observations like ANYmal's, our gradient step and its batches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from learner_proc.gradient_step import GradientStep
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, ReplaySettings, Settings
from shared.stream import ObsSpec, StreamSpec

OBS_DIM, ACTION_DIM, LENGTH = 48, 12, 50
OBS_NAME = "policy"
SPEC = StreamSpec(1, {OBS_NAME: ObsSpec((OBS_DIM,), "float32")}, ACTION_DIM)


def settings_for(frames: int, *, precision: str = "false", compiled: bool = False, tiny: bool = False) -> Settings:
    """Return settings with the sizes of TorchRL's recipe.

    The sizes are state 30, deterministic 200, hidden 400, horizon 15 and windows of 50.
    `tiny` shrinks widths and horizon to check that everything runs. `precision` is a value of `optimization.autocast`.
    """
    networks = NetworkSettings(state_dim=4, rssm_hidden_dim=8, hidden_dim=16) if tiny else NetworkSettings()
    optimization = OptimizationSettings(
        autocast=precision, imagination_horizon=3 if tiny else 15, compile=CompileSettings(enabled=compiled)
    )
    replay = ReplaySettings(batch_size=frames, batch_length=min(LENGTH, frames))
    return Settings(networks=networks, optimization=optimization, replay_buffer=replay)


def synthetic_batch(frames: int, *, device: torch.device, seed: int = 0) -> TensorDict:
    """Return windows (B, L) of up to 50 steps of noise, in the layout of the replay. No window contains a reset."""
    length = min(LENGTH, frames)
    lead = (frames // length, length)
    generator = torch.Generator().manual_seed(seed)
    never = torch.zeros(lead, dtype=torch.bool)
    fields = {
        "obs": TensorDict({OBS_NAME: torch.randn(*lead, OBS_DIM, generator=generator)}, lead),
        "action": torch.rand(*lead, ACTION_DIM, generator=generator) * 2 - 1,
        "reward": torch.randn(lead, generator=generator),
        **{name: never.clone() for name in ("is_first", "is_last", "is_terminal")},
    }
    return TensorDict(fields, lead).to(device)


def our_step(settings: Settings, *, device: torch.device) -> GradientStep:
    """Return our gradient step with a fixed seed: steps of different precision start from the same weights."""
    torch.manual_seed(0)
    return GradientStep(SPEC, settings, device=device)


def first_calls_s(call: Callable[[], Any], *, calls: int) -> float:
    """Return the wall seconds of the first calls, which include compilation."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forget_compiled() -> None:
    """Drop all compiled code.

    Otherwise torch would treat another size as a dynamic shape, and another mode would find old code in the cache.
    """
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
