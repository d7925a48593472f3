"""The figures that need no clock: how they are compared, and which cases there are."""

from pathlib import Path

import pytest

from benchmarks import counts
from benchmarks.count_cases import PRESETS
from benchmarks.counters import kernel_kind

CONFIGS = {path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")}


def test_every_file_in_configs_is_counted():
    assert set(PRESETS) == CONFIGS


def test_a_figure_that_rises_is_named_with_both_values():
    old = {"step": {"kernels": 100, "allocations": 0}, "gone": {"kernels": 1}}
    new = {"step": {"kernels": 101, "allocations": 0}, "added": {"kernels": 9}}
    assert counts.risen(new, old) == ["step: kernels rose from 100 to 101"]
    assert counts.risen({"step": {"kernels": 99, "allocations": 0}}, old) == []


@pytest.mark.parametrize(("value", "rises"), [(1019, False), (1021, True)])
def test_memory_may_rise_by_two_percent(value, rises):
    old, new = {"step": {"reserved_mb": 1000}}, {"step": {"reserved_mb": value}}
    assert bool(counts.risen(new, old)) is rises


def test_the_figures_of_the_peer_may_rise():
    assert counts.risen({"torchrl, 50 frames": {"kernels": 2}}, {"torchrl, 50 frames": {"kernels": 1}}) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_add_0", "triton"),
        ("nvjet_hsh_128x64_64x8_1x2_h_bz_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "products"),
        ("void at::native::vectorized_elementwise_kernel<4>", "pytorch"),
    ],
)
def test_a_kernel_is_attributed_by_its_name(name, kind):
    assert kernel_kind(name) == kind


def test_counting_without_a_cuda_device_is_refused_with_the_command_that_works(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["counts"])
    assert counts.main() == 2
    assert "expected a GPU, or a fake one; run python -m tests.fake_gpu" in capsys.readouterr().err
