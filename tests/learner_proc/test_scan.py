from __future__ import annotations

import pytest
import torch
from torch import nn

from learner_proc.scan import FEW_ROWS, Scan
from shared.model.layers import GRU, Linear, plain


def cell_of(gru: GRU, out: nn.Linear):
    def cell(state: torch.Tensor, x: torch.Tensor, *, linear: Linear = plain) -> torch.Tensor:
        return linear(out, gru(x, state, linear))

    return cell


def layers_of(seed: int = 0) -> tuple[GRU, nn.Linear]:
    torch.manual_seed(seed)
    return GRU(3, 5), nn.Linear(5, 5, bias=False)


def unroll(step, state: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
    for x in xs.unbind(0):
        state = step(state, x)
    return state.square().sum()


def scan_of(gru: GRU, out: nn.Linear, learned: list[nn.Linear], dtype=torch.float32) -> Scan:
    return Scan(cell_of(gru, out), [gru.input, gru.recurrent, out], learned=learned, dtype=dtype, compiled=lambda f: f)


def test_an_unrolled_scan_has_the_result_and_the_gradients_of_the_plain_cell():
    gru, out = layers_of()
    xs, state = torch.randn(6, 4, 3), torch.randn(4, 5, requires_grad=True)
    asked = [state, *gru.parameters(), *out.parameters()]
    loss = unroll(cell_of(gru, out), state, xs)
    expected = torch.autograd.grad(loss, asked)
    mine = unroll(scan_of(gru, out, [gru.input, gru.recurrent, out]).unroll(6, 4), state, xs)
    torch.testing.assert_close(mine, loss, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(torch.autograd.grad(mine, asked), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_layers_that_are_not_learned_pass_gradients_on_and_take_none():
    gru, out = layers_of()
    state = torch.randn(4, 5, requires_grad=True)
    loss = unroll(scan_of(gru, out, [out]).unroll(2, 4), state, torch.randn(2, 4, 3))
    grads = torch.autograd.grad(loss, [state, out.weight, *gru.parameters()], allow_unused=True)
    assert grads[0].any() and grads[1].any() and all(grad is None for grad in grads[2:])


def test_every_unrolling_uses_the_weights_of_its_moment():
    gru, out = layers_of()
    state, xs, rows = torch.ones(FEW_ROWS, 5), torch.ones(1, FEW_ROWS, 3), FEW_ROWS
    scan = scan_of(gru, out, [out], dtype=torch.bfloat16)
    before = unroll(scan.unroll(1, rows), state, xs)
    with torch.no_grad():
        out.weight.mul_(2)
    torch.testing.assert_close(unroll(scan.unroll(1, rows), state, xs), 4 * before, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(("rows", "rounded"), [(FEW_ROWS - 1, False), (FEW_ROWS, True)])
def test_products_of_few_rows_on_the_cpu_stay_in_float32(rows, rounded):
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, 1 + 2.0**-12)  # bfloat16 rounds this to 1

    def cell(x: torch.Tensor, *, linear: Linear, layer=linear) -> torch.Tensor:
        return linear(layer, x)

    step = Scan(cell, [linear], learned=[linear], dtype=torch.bfloat16, compiled=lambda f: f).unroll(1, rows)
    assert (step(torch.ones(rows, 1))[0].item() == 1.0) is rounded
