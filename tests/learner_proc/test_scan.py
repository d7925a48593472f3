from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from learner_proc import scan as scan_module
from learner_proc.scan import FEW_ROWS, STEPS_PER_CALL, Scan, unroll
from shared.model.layers import GRU, Linear, plain
from shared.model.rssm import Belief


class Result(NamedTuple):
    belief: Belief
    square: Tensor


class Cell:
    """A GRU and a layer without bias: h' = gru(x, h), z' = out(h')."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.gru, self.out = GRU(3, 5), nn.Linear(5, 2, bias=False)
        self.layers = [self.gru.input, self.gru.recurrent, self.out]
        self.params = [p for layer in self.layers for p in layer.parameters()]
        self.calls = 0

    def step(self, belief: Belief, x: Tensor, *, linear: Linear = plain) -> Result:
        deter = self.gru(x, belief.deter, linear)
        stoch = linear(self.out, deter) + belief.stoch
        return Result(Belief(deter, stoch), stoch.square())

    def scan(self, learned: list[nn.Linear], dtype: torch.dtype = torch.float32) -> Scan:
        def counted(function):
            def call(*arguments):
                self.calls += 1
                return function(*arguments)

            return call

        return Scan(self.step, self.layers, learned=learned, dtype=dtype, compiled=counted)


@pytest.fixture(params=["few rows", "many rows", "few rows, bias in product", "many rows, bias in product"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms a scan takes: weight gradients over all steps or call by call in blocks; a GPU's products, and a CPU's."""
    if "many" in request.param:
        monkeypatch.setattr(scan_module, "MANY_ROWS", 1)
        monkeypatch.setattr(scan_module, "CACHED_ROWS", 3)
    if "bias" in request.param:
        monkeypatch.setattr(scan_module, "bias_in_product", lambda x: True)


def start(rows: int) -> Belief:
    return Belief(torch.full((rows, 5), 0.1), torch.zeros(rows, 2))


@pytest.mark.parametrize(
    ("steps", "calls"), [(6, 1), (2 * STEPS_PER_CALL, 2), (STEPS_PER_CALL + 7, 2), (15, 3), (2, 1)]
)
@pytest.mark.usefixtures("form")
def test_a_scan_has_the_result_and_the_gradients_of_the_plain_cell_in_few_calls(steps: int, calls: int) -> None:
    cell, xs = Cell(), torch.randn(steps, 4, 3)
    plainly = unroll(cell.step, start(4), (xs,))
    found = cell.scan(cell.layers)(start(4), (xs,))
    assert cell.calls == calls and found.square.shape == (4, steps, 2)
    for mine, other in zip((*found.belief, found.square), (*plainly.belief, plainly.square), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plainly.square.sum(), cell.params)
    for mine, other in zip(torch.autograd.grad(found.square.sum(), cell.params), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("form")
def test_inputs_get_the_gradients_they_get_from_the_plain_cell() -> None:
    cell, xs = Cell(), torch.randn(2 * STEPS_PER_CALL, 4, 3, requires_grad=True)
    grads = [
        torch.autograd.grad(scan(start(4), (xs,)).square.sum(), xs)[0]
        for scan in (cell.scan(cell.layers), lambda belief, inputs: unroll(cell.step, belief, inputs))
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("form")
def test_layers_that_are_not_learned_pass_gradients_on_and_take_none() -> None:
    cell, xs = Cell(), torch.randn(2, 4, 3, requires_grad=True)
    loss = cell.scan([cell.out])(start(4), (xs,)).square.sum()
    asked = [xs, cell.out.weight, *cell.gru.parameters()]
    grads = torch.autograd.grad(loss, asked, allow_unused=True)
    assert grads[0].any() and grads[1].any() and all(grad is None for grad in grads[2:])


def test_every_scan_uses_the_weights_of_its_moment() -> None:
    cell, xs = Cell(), torch.ones(1, FEW_ROWS, 3)
    scan = cell.scan([cell.out], torch.bfloat16)
    before = scan(start(FEW_ROWS), (xs,)).belief.stoch
    with torch.no_grad():
        cell.out.weight.mul_(2)
    torch.testing.assert_close(scan(start(FEW_ROWS), (xs,)).belief.stoch, 2 * before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("rows", "rounded"), [(FEW_ROWS - 1, False), (FEW_ROWS, True)])
def test_products_of_few_rows_on_the_cpu_stay_in_float32(rows: int, rounded: bool) -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1 + 2.0**-12)  # bfloat16 rounds this to 1

    def step(belief: Belief, x: Tensor, *, linear: Linear) -> Result:
        y = linear(layer, x).float()
        return Result(Belief(y, y), y)

    scan = Scan(step, [layer], learned=[layer], dtype=torch.bfloat16, compiled=lambda function: function)
    one = scan(Belief(torch.zeros(rows, 1), torch.zeros(rows, 1)), (torch.ones(1, rows, 1),)).square
    assert (one[0].item() == 1.0) is rounded
