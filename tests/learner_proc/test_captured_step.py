"""A sampled step and a captured step do the same, and building one restores all state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from learner_proc import checkpoint
from learner_proc.captured_step import CapturedStep, SampledStep, Update
from learner_proc.gradient_step import GradientStep
from learner_proc.replay import Replay
from learner_proc.startup import build_gradient_step, build_step
from shared import metrics
from shared.config import Settings
from shared.geometry import Geometry
from shared.stream import ObsSpec, StreamSpec, plan_layout

B, L, E, K, CAPACITY = 4, 8, 3, 4, 64
SPEC = StreamSpec(E, {"policy": ObsSpec((5,), "float32"), "pixels": ObsSpec((64, 64, 3), "uint8")}, 2)
GEOMETRY = Geometry(E, E, K, CAPACITY, 2, B, L)
CPU = torch.device("cpu")
CAPTURES: list[tuple[str, bool, bool]] = [
    ("false", False, False),
    ("bfloat16", False, False),
    ("bfloat16", True, False),
    ("float16", False, False),
    ("bfloat16", False, True),
]


def settings_of(*, compiled: bool = False, graphs: bool = True, backend: str = "eager", autocast="false") -> Settings:
    settings = Settings()
    settings.networks.encoder_channels = 4
    settings.networks.state_dim, settings.networks.rssm_hidden_dim, settings.networks.hidden_dim = 3, 16, 16
    settings.optimization.imagination_horizon, settings.optimization.autocast = 4, autocast
    options = settings.optimization.compile
    options.enabled, options.cudagraphs, options.backend = compiled, graphs, backend
    return settings


def replay_on(device: torch.device, *, slab_device: torch.device | None = None) -> Replay:
    layout = plan_layout(SPEC, CAPACITY)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=slab_device or device)
    if slab.device.type == "cpu" and device.type == "cuda":
        slab = slab.pin_memory()
    replay = Replay(slab, layout, ticks_per_chunk=K, seed=5, device=device)
    generator = torch.Generator().manual_seed(3)
    for _ in range(CAPACITY // K):
        chunk = replay.chunk(replay.grant())
        for entry in layout.fields:
            shape = chunk.get(entry.key).shape
            values = torch.rand(shape, generator=generator)
            values = values < 0.1 if entry.dtype == "bool" else values * (255 if entry.dtype == "uint8" else 1)
            chunk.get(entry.key).copy_(values)
        replay.commit(replay.promised % CAPACITY - K if replay.promised % CAPACITY else CAPACITY - K)
    return replay


def learner(settings: Settings, device: torch.device = CPU, **where: Any) -> tuple[GradientStep, Replay, Any]:
    step, replay = build_gradient_step(SPEC, settings, device=device), replay_on(device, **where)
    return step, replay, build_step(step, replay, settings, GEOMETRY, device=device)


def measured(update: Update, num_steps: int) -> torch.Tensor:
    """Return copies of the values of several steps (num_steps, metrics). A captured step reuses its memory."""
    return torch.stack([update().values.clone() for _ in range(num_steps)])


def test_an_update_is_a_gradient_step_on_a_sample() -> None:
    step, _, update = learner(settings_of())
    torch.manual_seed(1)
    found = measured(update, 2)
    twin, replay, _ = learner(settings_of())
    torch.manual_seed(1)
    expected = measured(lambda: twin(replay.sample(B, L)), 2)
    assert isinstance(update, SampledStep)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(_flat(step), _flat(twin), strict=True))


def test_building_a_compiled_update_restores_all_state() -> None:
    settings = settings_of(compiled=True)
    step, replay = build_gradient_step(SPEC, settings, device=CPU), replay_on(CPU)
    before, random_before = copy.deepcopy(step.state_dict()), checkpoint.random_state(replay, CPU)
    build_step(step, replay, settings, GEOMETRY, device=CPU)
    for group, tensors in step.state_dict().items():
        assert all(torch.equal(value, before[group][name]) for name, value in tensors.items()), group
    for name, state in checkpoint.random_state(replay, CPU).items():
        assert torch.equal(state, random_before[name]), name


def test_on_a_cpu_the_setting_cudagraphs_has_no_effect() -> None:
    for graphs in (True, False):
        assert isinstance(learner(settings_of(graphs=graphs))[2], SampledStep)


@pytest.mark.gpu
@pytest.mark.parametrize(("autocast", "compiled", "hosted"), CAPTURES)
def test_captured_and_plain_updates_agree_over_20_steps(autocast: str, compiled: bool, hosted: bool) -> None:
    device, values = torch.device("cuda", 0), {}
    where = {"slab_device": CPU} if hosted else {}
    for graphs in (True, False):
        settings = settings_of(autocast=autocast, compiled=compiled, graphs=graphs, backend="inductor")
        _, _, update = learner(settings, device, **where)
        assert isinstance(update, CapturedStep if graphs else SampledStep)
        torch.manual_seed(1)
        values[graphs] = measured(update, 20).cpu()
        skipped = values[graphs][:, update().metrics.index(metrics.SKIPPED)]
        assert skipped.sum() <= (15 if autocast == "float16" else 0)
    rtol = 1e-4 if autocast == "false" else 0.02
    torch.testing.assert_close(values[True][-5:], values[False][-5:], rtol=rtol, atol=rtol)
    assert not torch.equal(values[True][0], values[True][-1]), "a launch must change the parameters"


@pytest.mark.gpu
def test_captured_updates_after_a_resume_equal_those_of_a_run_without_a_break() -> None:
    device, settings = torch.device("cuda", 0), settings_of()
    step, replay, update = learner(settings, device)
    for _ in range(3):
        update()
    state, random_state = step.state_dict(), checkpoint.random_state(replay, device)
    expected = measured(update, 3)
    resumed, its_replay, its_update = learner(settings, device)
    resumed.load_state_dict(state)
    checkpoint.restore_random_state(random_state, its_replay, device)
    found = measured(its_update, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_update_uses_the_bounds_of_the_replay_at_its_launch() -> None:
    """The graph reads the sampler's bounds on the device, so it does not sample rows that were granted meanwhile."""
    device = torch.device("cuda", 0)
    _, replay, update = learner(settings_of(), device)
    replay.grant()
    granted = (replay.promised - K) % CAPACITY
    replay.chunk(granted).get("reward").fill_(float("nan"))
    for _ in range(50):
        assert update().to_host()[metrics.SKIPPED] == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("where", [{}, {"slab_device": CPU}], ids=["replay on the GPU", "replay in host memory"])
def test_launching_a_captured_update_does_not_synchronise(where: dict) -> None:
    device = torch.device("cuda", 0)
    _, _, update = learner(settings_of(), device, **where)
    for _ in range(6):  # the first calls allocate pinned memory for samples of a replay in host memory
        update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _flat(step: GradientStep) -> list[torch.Tensor]:
    return [tensor for group in step.state_dict().values() for tensor in group.values()]
