"""The benchmark of the gradient step: its floor, its phases, its memory figures and its report."""

import json

import pytest
import torch

from benchmarks import learner, provenance
from benchmarks.floor import ADAM_BYTES, Operand, ProductRecorder, measure_floor
from benchmarks.phases import BACKWARDS, OPTIMISERS, PARTS, REST, PhaseClock
from benchmarks.step_cases import settings_for
from learner_proc import startup

CPU = torch.device("cpu")


def test_every_product_is_recorded_with_its_shapes_strides_types_and_count():
    a, weight = torch.randn(3, 5), torch.randn(7, 5)
    with ProductRecorder() as recorder:
        for _ in range(2):
            torch.mm(a, weight.t())
        torch.mm(a.bfloat16(), weight.t().bfloat16())
        (a + 1).tanh()
    left = Operand((3, 5), (5, 1), torch.float32)
    found = {(func._overloadpacket, args): count for (func, args, _), count in recorder.products.items()}
    assert found[torch.ops.aten.mm, (left, Operand((5, 7), (1, 5), torch.float32))] == 2
    assert recorder.products.total() == 3


def test_a_floor_counts_every_product_forward_and_backward():
    rows, num_in, num_out = 6, 4, 3
    weight = torch.randn(num_out, num_in, requires_grad=True)
    x = torch.randn(rows, num_in, requires_grad=True)

    def step():
        torch.autograd.grad((x @ weight.t()).sum(), [x, weight])

    floor = measure_floor(step, num_params=12, device=CPU, bandwidth=1e9)
    assert floor.flops == 3 * 2 * rows * num_in * num_out
    assert floor.num_products == 3
    assert floor.optimiser_s == pytest.approx(12 * ADAM_BYTES / 1e9)
    assert floor.products_s > 0


@pytest.mark.parametrize("stride", [(5, 1), (1, 3), (0, 1)])
def test_an_operand_is_recreated_in_its_layout(stride):
    made = Operand((3, 5), stride, torch.bfloat16).make(CPU)
    assert made.shape == (3, 5) and made.stride() == stride and made.dtype == torch.bfloat16


def test_the_adam_floor_counts_seven_float32_values_per_parameter():
    assert ADAM_BYTES == 7 * 4


def test_a_run_reports_every_variant_with_its_phases_and_its_scaling(tmp_path):
    result = learner.run(
        [20], compiled=[False], phases=True, scaling=True, scaling_frames=[20, 50], repetitions=2, tiny=True
    )
    assert [row["variant"] for row in result["steps"]] == ["fp32 eager", "bf16 eager"]
    for row in result["steps"]:
        assert row["steps_per_s"] > 0 and row["flops"] > 0 and row["share_of_floor"] > 0
        assert row["tflops"] == pytest.approx(row["flops"] * row["steps_per_s"] / 1e12)
    assert set(result["phases"][0]["ms"]) == {*PARTS.values(), *BACKWARDS.values(), OPTIMISERS, REST}
    assert [row["frames"] for row in result["scaling"]["rows"]] == [20, 50]
    assert all(row["peak_gib"] > 0 for row in result["scaling"]["rows"])
    assert len(learner.rows(result)) == 2 + 2 * len(result["phases"][0]["ms"]) + 2
    provenance.save(tmp_path / "out.json", provenance.document(learner.NAME, result))
    assert json.loads((tmp_path / "out.json").read_text())["runtime"]["steps"] == result["steps"]


def test_without_a_gpu_captured_graphs_are_reported_as_left_out():
    result = learner.run([20], precisions=["false"], compiled=[False], repetitions=1, tiny=True)
    assert result["left_out"] == ["captured graphs: no CUDA device"]


def test_the_time_of_an_inner_phase_does_not_count_for_the_outer_one():
    watch = PhaseClock(CPU, "wall")
    ticks = iter(range(100))
    watch.now = lambda: float(next(ticks))  # every reading of the clock is one second later
    inner = watch.timed("inner", lambda: None)
    watch.timed("outer", lambda: (inner(), inner()))()
    assert watch.seconds == {"outer": 3.0, "inner": 2.0}


def test_a_captured_step_gets_a_full_replay_of_noise(monkeypatch):
    settings = settings_for(20, tiny=True)
    settings.replay_buffer.buffer_size = 2000

    def build(step, replay, settings, geometry, *, device):
        return lambda: replay.sample(geometry.num_sequences, geometry.sequence_length)

    monkeypatch.setattr(startup, "build_step", build)
    batch = learner.captured_step(settings, device=CPU)()
    assert batch.shape == (1, 20)
    assert batch["obs", "policy"].std() > 0.5 and batch["reward"].std() > 0.5
    assert not batch["is_first"].any()


def test_peak_memory_does_not_include_memory_freed_before_the_step():
    torch.ones(100 << 20, dtype=torch.uint8)
    learner.forget_peak(CPU)
    before = learner.peak_bytes(CPU)
    big = torch.ones(50 << 20, dtype=torch.uint8)
    assert learner.peak_bytes(CPU) - before + (4 << 20) >= (50 << 20) and big[0] == 1
    del big
    learner.forget_peak(CPU)
    assert learner.peak_bytes(CPU) < before + (25 << 20)


def test_the_scaling_picture_is_drawn_from_both_results(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import scaling

    rows = [{"frames": n, "steps_per_s": 1 / n, "frames_per_s": 1.0, "peak_gib": n / 100} for n in (50, 500)]
    hardware = {"cpu": "a CPU", "gpus": []}
    steps = {"scaling": {"variant": "bf16 compiled", "rows": [*rows, {"frames": 5000, "failed": "out of memory"}]}}
    one = {"stream": {"ticks_per_s": {"median": 10.0}, "collector_gib": {"median": 0.5}}}
    ticks = {"scaling": {"64": one, "256": one}}
    learned, streamed = (
        {"hardware": hardware, "runtime": found | {"device": "cpu", "threads": 1}} for found in (steps, ticks)
    )
    scaling.draw(learned, streamed, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
