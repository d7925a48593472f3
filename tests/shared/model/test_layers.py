"""The GRU and dense layers: what they compute and how they are initialised."""

import math

import pytest
import torch
from torch import nn

from shared.model.layers import GRU, Normaliser, RunningNorm, dense, mlp, symlog
from shared.stream import ObsSpec, StreamSpec


def test_the_gru_computes_what_nn_grucell_computes():
    torch.manual_seed(0)
    ours, oracle = GRU(5, 7), nn.GRUCell(5, 7)
    with torch.no_grad():
        for bias in (ours.input.bias, ours.recurrent.bias):
            bias.normal_()
        oracle.weight_ih.copy_(ours.input.weight)
        oracle.weight_hh.copy_(ours.recurrent.weight)
        oracle.bias_ih.copy_(ours.input.bias)
        oracle.bias_hh.copy_(ours.recurrent.bias)
    x, state = torch.randn(4, 5), torch.randn(4, 7)
    torch.testing.assert_close(ours(x, state), oracle(x, state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gru_state_stays_float32_under_autocast(dtype):
    with torch.autocast("cpu", dtype):
        assert GRU(5, 7)(torch.randn(4, 5), torch.randn(4, 7)).dtype == torch.float32


def test_dense_layers_start_glorot_uniform_with_zero_bias():
    torch.manual_seed(0)
    layer, bound = dense(300, 100), math.sqrt(6 / 400)
    assert not layer.bias.any()
    assert 0.98 * bound < layer.weight.abs().max() <= bound
    torch.testing.assert_close(layer.weight.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.02, atol=0.0)


def test_the_recurrent_kernel_starts_orthogonal():
    weight = GRU(5, 8).recurrent.weight  # (24, 8)
    torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0.0, atol=1e-5)


def test_an_mlp_without_output_size_ends_on_an_activation():
    net = mlp(4, 8, 3, "relu")
    assert len(net) == 6 and (net(torch.randn(100, 4)) >= 0).all()


def test_an_mlp_with_output_size_ends_on_a_linear_layer():
    net = mlp(4, 8, 3, "elu", 2)
    assert len(net) == 7 and isinstance(net[-1], nn.Linear) and net[-1].out_features == 2


def test_chunkwise_statistics_equal_those_of_all_rows_at_once():
    torch.manual_seed(0)
    rows = torch.randn(60, 3) * torch.tensor([0.02, 1.0, 50.0]) + torch.tensor([-1.0, 0.0, 300.0])
    norm = RunningNorm(3)
    for part in rows.split([10, 1, 49]):
        norm.update(part.view(-1, 1, 3))
    torch.testing.assert_close(norm.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.var, rows.var(0, correction=0), rtol=1e-4, atol=1e-6)
    assert norm.count.item() == 60


def test_normalised_rows_have_zero_mean_and_unit_spread():
    torch.manual_seed(0)
    rows = torch.randn(500, 2) * torch.tensor([0.02, 50.0]) + 7
    norm = RunningNorm(2)
    norm.update(rows)
    torch.testing.assert_close(norm(rows).mean(0), torch.zeros(2), rtol=0.0, atol=1e-3)
    torch.testing.assert_close(norm(rows).std(0, correction=0), torch.ones(2), rtol=1e-3, atol=0.0)


def test_normalised_values_are_clipped_at_ten_and_a_constant_dimension_stays_finite():
    norm = RunningNorm(2)
    norm.update(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
    out = norm(torch.tensor([[1e6, 5.0], [-1e6, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[10.0, 0.0], [-10.0, 0.0]]), rtol=0.0, atol=1e-4)


def test_the_normaliser_changes_no_image_and_before_the_first_row_no_vector():
    spec = StreamSpec(1, {"pixels": ObsSpec((64, 64, 3), "uint8"), "policy": ObsSpec((2,), "float32")}, 1)
    obs = {"pixels": torch.full((1, 64, 64, 3), 200, dtype=torch.uint8), "policy": torch.tensor([[3.0, -4.0]])}
    norm = Normaliser(spec, enabled=True)
    out = norm(obs)
    assert torch.equal(out["policy"], obs["policy"]) and torch.equal(out["pixels"], obs["pixels"])
    norm.update({"pixels": obs["pixels"], "policy": torch.tensor([[1.0, 1.0], [3.0, 3.0]])})
    torch.testing.assert_close(norm(obs)["policy"], torch.tensor([[1.0, -6.0]]), rtol=1e-5, atol=0.0)


def test_a_disabled_normaliser_has_no_state_and_changes_nothing():
    spec = StreamSpec(1, {"policy": ObsSpec((2,), "float32")}, 1)
    norm = Normaliser(spec, enabled=False)
    norm.update({"policy": torch.tensor([[100.0, 100.0]])})
    assert not norm.state_dict()
    assert norm({"policy": torch.tensor([[50.0, 3.0]])})["policy"].tolist() == [[50.0, 3.0]]


def test_symlog_is_the_identity_near_zero_and_logarithmic_far_out():
    x = torch.tensor([0.0, 1e-4, math.e - 1, -(math.e**3 - 1)])
    torch.testing.assert_close(symlog(x), torch.tensor([0.0, 1e-4, 1.0, -3.0]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("normalised", "expected"), [(True, math.log(1 + 50)), (False, math.log(1 + 1003))])
def test_symlogged_vectors_are_compressed_after_normalisation_and_not_clipped(normalised, expected):
    spec = StreamSpec(1, {"pixels": ObsSpec((64, 64, 3), "uint8"), "policy": ObsSpec((1,), "float32")}, 1)
    norm = Normaliser(spec, enabled=normalised, symlogged=True)
    norm.update({"policy": torch.tensor([[-17.0], [23.0]])})  # mean 3, std 20
    obs = {"pixels": torch.full((1, 64, 64, 3), 200, dtype=torch.uint8), "policy": torch.tensor([[1003.0]])}
    out = norm(obs)
    assert out["policy"].item() == pytest.approx(expected, rel=1e-5) and torch.equal(out["pixels"], obs["pixels"])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("symlogged", [True, False])
def test_no_finite_observation_leaves_the_range_of_the_networks(normalised, symlogged):
    spec = StreamSpec(1, {"policy": ObsSpec((2,), "float32")}, 1)
    norm = Normaliser(spec, enabled=normalised, symlogged=symlogged)
    norm.update({"policy": torch.zeros(4, 2)})
    out = norm({"policy": torch.tensor([[3e38, -3e38]])})["policy"]
    assert out.isfinite().all() and out.square().isfinite().all() and out[0, 0] == -out[0, 1] > 0
