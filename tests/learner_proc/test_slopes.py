from __future__ import annotations

import pytest
import torch

from learner_proc.slopes import read_head, weight_gradients
from shared.model.layers import mlp


@pytest.mark.parametrize("activation", ["elu", "relu", "silu"])
def test_a_reading_gives_the_gradients_that_autograd_gives(activation):
    torch.manual_seed(0)
    layers = mlp(7, 11, 3, activation, 1)
    feat, upstream = torch.randn(50, 7, requires_grad=True), torch.randn(50)
    value = layers(feat).squeeze(-1)
    feat_grad, *grads = torch.autograd.grad((value * upstream).sum(), [feat, *layers.parameters()])
    reading = read_head(layers, feat, torch.float32)
    assert not reading.value.requires_grad and not reading.slope.requires_grad
    torch.testing.assert_close(reading.value, value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(upstream[:, None] * reading.slope, feat_grad, rtol=1e-5, atol=1e-6)
    for mine, other in zip(weight_gradients(reading, upstream), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_linear_head_has_its_weight_as_slope():
    layer = torch.nn.Linear(3, 1)
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.zeros_(layer.bias)
    layers = torch.nn.Sequential(layer)
    reading = read_head(layers, torch.tensor([[1.0, 2.0, 3.0]]), torch.float32)
    assert reading.value.tolist() == [12.0] and reading.slope.tolist() == [[2.0, 2.0, 2.0]]
    weight, bias = weight_gradients(reading, torch.tensor([10.0]))
    assert weight.tolist() == [[10.0, 20.0, 30.0]] and bias.tolist() == [10.0]
