"""Heads evaluated with their slopes give the gradients of autograd."""

from __future__ import annotations

import pytest
import torch

from learner_proc import slopes
from learner_proc.heads import ScalarHead
from learner_proc.slopes import HeadEvaluator
from shared.config import NetworkSettings
from shared.model.layers import mlp

HEADS = HeadEvaluator(torch.float32, compiled=lambda function: function)


@pytest.mark.parametrize("rows", [50, 7], ids=["one block", "ten blocks"])
@pytest.mark.parametrize("activation", ["elu", "relu", "silu"])
def test_an_evaluation_gives_the_gradients_that_autograd_gives(activation, rows, monkeypatch):
    monkeypatch.setattr(slopes, "CACHED_ROWS", rows)
    torch.manual_seed(0)
    layers = mlp(7, 11, 3, activation, 1)
    feat, upstream = torch.randn(50, 7, requires_grad=True), torch.randn(50)
    value = layers(feat).squeeze(-1)
    feat_grad, *grads = torch.autograd.grad((value * upstream).sum(), [feat, *layers.parameters()])
    evaluation = HEADS.evaluate(layers, feat, for_weights=True)
    assert len(evaluation.blocks) == {50: 1, 7: 10}[rows]
    assert not evaluation.value.requires_grad and not evaluation.slope.requires_grad
    torch.testing.assert_close(evaluation.value, value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(HEADS.feat_gradient([evaluation], [upstream]), feat_grad, rtol=1e-5, atol=1e-6)
    for mine, other in zip(HEADS.weight_gradients(evaluation, upstream), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_values_are_exact_when_the_products_are_in_bfloat16():
    """bfloat16 has a precision of eight bits: near 150 it has only whole numbers."""
    torch.manual_seed(0)
    head = ScalarHead(7, 2, NetworkSettings(hidden_dim=11))
    torch.nn.init.constant_(list(head.parameters())[-1], 150.4)
    feat = torch.randn(50, 7)
    exact = head(feat).detach()
    evaluator = HeadEvaluator(torch.bfloat16, compiled=lambda function: function)
    with torch.autocast("cpu", torch.bfloat16):
        found = {"read": evaluator.evaluate(head.layers, feat, for_weights=False).value, "called": head(feat).detach()}
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value - 150.4, exact - 150.4, rtol=0.05, atol=0.02, msg=name)


def test_the_slope_of_a_linear_head_is_its_weight():
    layer = torch.nn.Linear(3, 1)
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.zeros_(layer.bias)
    layers = torch.nn.Sequential(layer)
    evaluation = HEADS.evaluate(layers, torch.tensor([[1.0, 2.0, 3.0]]), for_weights=True)
    assert evaluation.value.tolist() == [12.0] and evaluation.slope.tolist() == [[2.0, 2.0, 2.0]]
    weight, bias = HEADS.weight_gradients(evaluation, torch.tensor([10.0]))
    assert weight.tolist() == [[10.0, 20.0, 30.0]] and bias.tolist() == [10.0]


def test_the_gradient_of_a_feature_is_the_sum_over_all_heads():
    torch.manual_seed(0)
    heads, feat = [mlp(3, 4, 2, "elu", 1) for _ in range(3)], torch.randn(5, 3, requires_grad=True)
    upstream = [torch.randn(5) for _ in heads]
    total = sum((head(feat).squeeze(-1) * up).sum() for head, up in zip(heads, upstream, strict=True))
    assert isinstance(total, torch.Tensor)
    (expected,) = torch.autograd.grad(total, feat)
    found = HEADS.feat_gradient([HEADS.evaluate(head, feat, for_weights=False) for head in heads], upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
