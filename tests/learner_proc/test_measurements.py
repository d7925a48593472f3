"""Measurements as a graph give the same numbers as without one, and leave the state of the learner alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from learner_proc.checkpoint import random_state
from learner_proc.gradient_step import GradientStep
from learner_proc.measurements import CapturedMeasurements, Measurements
from learner_proc.numbers import Numbers
from learner_proc.replay import Replay
from learner_proc.startup import blank_batch, build_gradient_step, build_measurements
from shared.config import Settings
from shared.stream import ObsSpec, StreamSpec, plan_layout

E, K, CAPACITY = 3, 8, 96
SPEC = StreamSpec(E, {"policy": ObsSpec((4,), "float32")}, 2)
CPU = torch.device("cpu")


def made(device: torch.device, *, slab_device: torch.device | None = None) -> tuple[Settings, GradientStep, Replay]:
    """Return a small learner whose replay is full of noise with few episode ends."""
    settings = Settings()
    settings.networks.state_dim, settings.networks.rssm_hidden_dim, settings.networks.hidden_dim = 3, 8, 8
    settings.optimization.compile.enabled, settings.optimization.autocast = False, "false"
    layout = plan_layout(SPEC, CAPACITY)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=slab_device or device)
    replay = Replay(slab, layout, ticks_per_chunk=K, seed=5, device=device)
    generator = torch.Generator().manual_seed(3)
    for entry in layout.fields:
        view = replay.views.get(entry.key)
        noise = torch.rand(view.shape, generator=generator)
        view.copy_(noise < 0.005 if entry.dtype == "bool" else noise * (50 if entry.dtype == "int64" else 1))
    replay.restore(CAPACITY)
    return settings, build_gradient_step(SPEC, settings, device=device), replay


def repeated(function: Callable[[], Numbers], device: torch.device, **options: Any) -> tuple[Callable, Numbers]:
    """Play a graph: run the function again at each launch and overwrite the numbers of the first run."""
    numbers = function()

    def launch() -> None:
        numbers.values.copy_(function().values)

    return launch, numbers


def as_graph(settings: Settings, step: GradientStep, replay: Replay) -> CapturedMeasurements:
    blank = partial(blank_batch, step.spec, device=replay.device)
    return CapturedMeasurements(step, replay, settings.optimization, blank=blank, capture=repeated)


def measured(measurements: Measurements, seed: int) -> dict:
    numbers = measurements(seed=seed)
    assert numbers is not None and numbers.metrics == measurements.metrics
    return numbers.to_host()


def test_a_graph_gives_the_same_numbers_for_every_batch_and_after_further_training():
    settings, step, replay = made(CPU)
    plain, graph = Measurements(step, replay, settings.optimization), as_graph(settings, step, replay)
    first = measured(plain, 1)
    assert measured(graph, 1) == first and measured(graph, 2) == measured(plain, 2) != first
    step(replay.sample(4, 8))
    assert measured(graph, 1) == measured(plain, 1) != first, "the graph reads the present parameters"
    assert all(value == value for value in first.values()), "enough windows count"


def test_capturing_leaves_the_random_states_and_the_parameters_alone():
    settings, step, replay = made(CPU)
    before, state = random_state(replay, CPU), step.state_dict()
    as_graph(settings, step, replay)(seed=3)
    after = random_state(replay, CPU)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for group, tensors in step.tensors().items():
        assert all(torch.equal(tensor, state[group][name]) for name, tensor in tensors.items())


def test_without_enough_rows_a_graph_measures_nothing():
    settings, step, replay = made(CPU)
    graph = as_graph(settings, step, replay)
    replay.restore(K)
    assert graph(seed=0) is None


def test_without_cuda_graphs_the_numbers_are_measured_directly():
    settings, step, replay = made(CPU)
    assert type(build_measurements(step, replay, settings, device=CPU)) is Measurements


@pytest.mark.gpu
@pytest.mark.parametrize("slab_device", ["cuda", "cpu"])
def test_a_captured_graph_gives_the_same_numbers_on_a_gpu(slab_device):
    device = torch.device("cuda")
    settings, step, replay = made(device, slab_device=torch.device(slab_device))
    plain, graph = (
        Measurements(step, replay, settings.optimization),
        build_measurements(step, replay, settings, device=device),
    )
    assert isinstance(graph, CapturedMeasurements)
    for seed in (1, 2):
        assert measured(graph, seed) == pytest.approx(measured(plain, seed), rel=1e-4, abs=1e-6, nan_ok=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph(seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
