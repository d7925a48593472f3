"""Unrolled cells whose weight gradients wait until the end.

Left to autograd, every step of a scan makes a weight gradient of its own for every layer: T thin matrix products, T sums of
whole matrices, and with autocast T casts of each weight. Here a step multiplies by a frozen copy of the weight, cast once,
and leaves its input behind; each weight's gradient is then one product over all steps:

    y_t = x_t W' + b      dW = [dy_1 .. dy_T]' [x_1 .. x_T]      db = sum_t dy_t

The bias carries this: a view of b with one row for every step and row of the batch goes into the scan, and the gradient
that comes back to it is all dy_t at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_ROWS = 10  # of a product on the CPU, below which calling bfloat16 costs more than float32 arithmetic


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
        inputs = torch.cat(ctx.inputs)  # (T * N, in)
        return grad, (grad.flatten(0, 1).t() @ inputs).float(), None


class Scan:
    """One cell, unrolled: the linear layers it applies, in the order in which it applies them.

    `cell(*arguments, linear=...)` calls `linear(layer, x)` for each of them. Layers in `learned` get weight gradients
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
        """`dtype`: of the matrix products; `compiled`: what the step passes through, torch.compile or nothing."""
        self._layers = list(layers)
        self._learned = [any(layer is other for other in learned) for layer in self._layers]
        masters = [layer.weight.detach() for layer in self._layers]
        self._frozen = masters if dtype == torch.float32 else [master.to(dtype) for master in masters]
        self._masters = masters
        self._cell = compiled(_step_of(cell))

    def unroll(self, num_steps: int, num_rows: int) -> Callable[..., Any]:
        """The cell as a function of its arguments alone, to be called `num_steps` times on `num_rows` rows.

        Weights are those of this moment. Gradients must be taken before the next unrolling.
        """
        frozen = self._masters if num_rows < FEW_ROWS and not self._masters[0].is_cuda else self._frozen
        if frozen is not self._masters:
            torch._foreach_copy_(frozen, self._masters)  # pyright: ignore[reportPrivateImportUsage]
        inputs: list[list[Tensor]] = [[] for _ in self._layers]
        lead, dtype = (num_steps, num_rows), frozen[0].dtype
        rows = [self._rows(index, lead, inputs[index], dtype) for index in range(len(self._layers))]
        steps = zip(*(one.unbind(0) for one in rows), strict=True)

        def step(*arguments: Any) -> Any:
            result, seen = self._cell(tuple(frozen), next(steps), *arguments)
            for kept, x, learned in zip(inputs, seen, self._learned, strict=True):
                if learned:
                    kept.append(x)
            return result

        return step

    def _rows(self, index: int, lead: tuple[int, int], inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The layer's bias, seen once by every step and row: (T, N, out) without a copy."""
        layer = self._layers[index]
        if layer.bias is None:
            rows = layer.weight.new_zeros(layer.out_features, dtype=dtype)
        elif self._learned[index]:
            rows = layer.bias.to(dtype)
        else:
            rows = layer.bias.detach().to(dtype)
        rows = rows.expand(*lead, -1)
        return cast(Tensor, _WeightGradient.apply(rows, layer.weight, inputs)) if self._learned[index] else rows


def _step_of(cell: Callable[..., Any]) -> Callable[..., Any]:
    """The cell with its weights and rows as arguments; also returns the input of every product, detached."""

    def step(weights: tuple[Tensor, ...], rows: tuple[Tensor, ...], *arguments: Any) -> tuple[Any, tuple[Tensor, ...]]:
        seen: list[Tensor] = []

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            weight, row = weights[len(seen)], rows[len(seen)]
            x = x.to(weight.dtype)
            seen.append(x.detach())
            return torch.addmm(row, x, weight.t())

        with torch.autocast(weights[0].device.type, enabled=False):  # the casts are made above
            result = cell(*arguments, linear=linear)
        return result, tuple(seen)

    return step
