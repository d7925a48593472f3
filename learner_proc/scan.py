"""Cells unrolled over time, whose weight gradients wait until the end.

Left to autograd, every step of a scan makes a weight gradient of its own for every layer: T thin matrix products, T sums of
whole matrices, and with autocast T casts of each weight. Here a step multiplies by a frozen copy of the weight, cast once,
and leaves its input behind; each weight's gradient is then one product over all steps:

    y_t = x_t W' + b      dW = [dy_1 .. dy_T]' [x_1 .. x_T]      db = sum_t dy_t

The bias carries this: a view of b with one row for every step and row of the batch goes into the scan, and the gradient
that comes back to it is all dy_t at once. On a GPU b itself goes into the product, which adds it to all rows for nothing,
and the rows that carry are b - b: a matrix of rows would be copied into the result before every product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from shared.model.rssm import Belief

CACHED_ROWS = 2500  # on the CPU: products over more rows than this fall out of the cache
FEW_ROWS = 10  # of a product on the CPU, below which calling bfloat16 costs more than float32 arithmetic
MANY_ROWS = 4096  # of all steps, above which weight gradients are taken call by call: joining the inputs costs more
STEPS_PER_CALL = 10  # most steps that are compiled as one: a call costs as much as a cell's arithmetic on few rows


def bias_in_product(x: Tensor) -> bool:
    """Whether products on the device of `x` add a bias of one row for nothing, and a matrix of rows only after a copy."""
    return x.is_cuda


def unroll(cell: Callable[..., Any], belief: Belief, inputs: Sequence[Tensor]) -> Any:
    """What `cell(belief, *inputs of a step)` returned along the steps, every tensor stacked as (N, T, ...).

    The result's `belief` goes into the next step. Shapes: belief (N, ...), inputs (T, N, ...).
    """
    results: list[Any] = []
    # unbind, not indexing: the gradient of an index is a full tensor of zeros at every step
    for step_inputs in zip(*(x.unbind(0) for x in inputs), strict=True):
        results.append(cell(belief, *step_inputs))
        belief = results[-1].belief
    return pytree.tree_map(lambda *steps: torch.stack(steps, 1), *results)


class _WeightGradient(torch.autograd.Function):
    """The identity on a layer's rows, which gives its weight a gradient from what the steps left in `inputs`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs = inputs
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        inputs = ctx.inputs[0] if len(ctx.inputs) == 1 else torch.cat(ctx.inputs)  # (T * N, in)
        flat, rows = grad.flatten(0, 1), inputs.shape[0] if inputs.is_cuda else CACHED_ROWS
        with torch.autocast(inputs.device.type, enabled=False):
            total, *rest = [(g.t() @ x).float() for g, x in zip(flat.split(rows), inputs.split(rows), strict=True)]
        return grad, sum(rest, total), None


class Scan:
    """`unroll` of one cell: the linear layers it applies, in the order in which it applies them.

    `cell(belief, *inputs, linear=...)` calls `linear(layer, x)` for each of them. Layers in `learned` get weight gradients
    in the way above; the others are constants.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        layers: Sequence[nn.Linear],
        *,
        learned: Sequence[nn.Linear],
        dtype: torch.dtype,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """`dtype`: of the matrix products; `compiled`: what a few steps at a time pass through."""
        self._layers = list(layers)
        self._learned = [any(layer is other for other in learned) for layer in self._layers]
        self._masters = [layer.weight.detach() for layer in self._layers]
        self._frozen = self._masters if dtype == torch.float32 else [master.to(dtype) for master in self._masters]
        self._steps = compiled(_steps_of(cell, self._learned))

    def __call__(self, belief: Belief, inputs: Sequence[Tensor]) -> Any:
        """As `unroll`, with the weights of this moment; gradients must be taken before the next call."""
        num_steps, num_rows = inputs[0].shape[:2]
        frozen = self._masters if num_rows < FEW_ROWS and not self._masters[0].is_cuda else self._frozen
        if frozen is not self._masters:
            torch._foreach_copy_(frozen, self._masters)  # pyright: ignore[reportPrivateImportUsage]
        # asks for a gradient like all later beliefs, so that one compiled graph serves every call
        belief = Belief(*(part.detach().requires_grad_(torch.is_grad_enabled()) for part in belief))
        biases = tuple(self._bias(layer).detach().to(frozen[0].dtype) for layer in self._layers)
        results: list[Any] = []
        # equal calls if it can be, else a shorter last one, which is compiled too
        size = next(
            (k for k in range(STEPS_PER_CALL, STEPS_PER_CALL // 2 - 1, -1) if num_steps % k == 0), STEPS_PER_CALL
        )
        group = num_steps if num_steps * num_rows < MANY_ROWS else size
        for group_inputs in zip(*(x.split(group) for x in inputs), strict=True):
            kept: list[list[Tensor]] = [[] for _ in self._layers]
            lead, dtype = (group_inputs[0].shape[0], num_rows), frozen[0].dtype
            rows = [self._rows(index, lead, kept[index], dtype) for index in range(len(self._layers))]
            for pieces in zip(*(_split(x, size) for x in (*rows, *group_inputs)), strict=True):
                some, belief, seen = self._steps(
                    tuple(frozen), biases, pieces[: len(rows)], belief, pieces[len(rows) :]
                )
                results.append(some)
                for layer_inputs, x in zip(kept, seen, strict=True):
                    layer_inputs.append(x)
        return pytree.tree_map(lambda *parts: torch.cat(parts, 1), *results)

    def _rows(self, index: int, lead: tuple[int, int], inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The layer's bias, or on a GPU zeros, seen once by every step and row: (T, N, out) without a copy."""
        layer = self._layers[index]
        bias = self._bias(layer) if self._learned[index] else self._bias(layer).detach()
        rows = (bias - bias.detach() if bias_in_product(bias) else bias).to(dtype).expand(*lead, -1)
        return cast(Tensor, _WeightGradient.apply(rows, layer.weight, inputs)) if self._learned[index] else rows

    @staticmethod
    def _bias(layer: nn.Linear) -> Tensor:
        return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _split(x: Tensor, size: int) -> Sequence[Tensor]:
    """Along the steps; a whole one as it is, since the gradient of a split is a copy."""
    return (x,) if x.shape[0] <= size else x.split(size)


def _steps_of(cell: Callable[..., Any], learned: Sequence[bool]) -> Callable[..., Any]:
    """A few steps of the cell with weights, biases and rows as arguments.

    Returns what `unroll` returns, the last belief, and the inputs (k * N, in) of each learned layer's products, detached,
    nothing for the others.
    """

    def steps(
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor, ...],
        rows: tuple[Tensor, ...],
        belief: Belief,
        inputs: tuple[Tensor, ...],
    ) -> tuple[Any, Belief, list[Tensor]]:
        seen: list[list[Tensor]] = [[] for _ in weights]
        calls = [
            (index, row)
            for step_rows in zip(*(r.unbind(0) for r in rows), strict=True)
            for index, row in enumerate(step_rows)
        ]
        calls.reverse()

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            index, row = calls.pop()
            x = x.to(weights[index].dtype)
            if learned[index]:
                seen[index].append(x.detach())
            return _affine(x, weights[index], biases[index], row, learned=learned[index])

        def step(belief: Belief, *step_inputs: Tensor) -> Any:
            return cell(belief, *step_inputs, linear=linear)

        with torch.autocast(weights[0].device.type, enabled=False):  # the casts are made above
            results = unroll(step, belief, inputs)
        return (
            results,
            Belief(*(part[:, -1] for part in results.belief)),
            [torch.cat(xs) if xs else weights[0].new_empty(0) for xs in seen],
        )

    return steps


def _affine(x: Tensor, weight: Tensor, bias: Tensor, row: Tensor, *, learned: bool) -> Tensor:
    """x W' + b, so that the gradient at it reaches `row`; as in `Scan._rows`. Shapes: x (N, in), row (N, out)."""
    if not bias_in_product(x):
        return torch.addmm(row, x, weight.t())
    product = torch.addmm(bias, x, weight.t())
    return product + row if learned else product
