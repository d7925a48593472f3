"""Unroll a recurrent cell over time, and compute the gradient of each weight once, at the end.

A cell applies a few linear layers in every step, y_t = x_t W' + b, to N rows at a time. Plain autograd differentiates
every step by itself:

    step        1                2               ...    T
    forward     y_1 = x_1 W'+b   y_2 = x_2 W'+b         y_T = x_T W'+b
    backward    dW = dy_1' x_1   +  dy_2' x_2    + ...  +  dy_T' x_T

These are T thin products and T - 1 sums of whole matrices for each layer, and with a lower precision also T casts of
each weight. A scan instead multiplies by a constant copy of the weight, which is cast once, and keeps the input of
every step. One product over all T * N rows then gives the same gradient:

    dW = [dy_1; dy_2; ...; dy_T]' [x_1; x_2; ...; x_T]       db = the sum of all rows of dy

Autograd has to bring dy_1 .. dy_T to that product. They travel through the bias, because the gradient of what is added
to a product is the product's own gradient:

    b ──> _WeightGradient ──> rows (T, N, out) ──> step t adds rows[t] to x_t W'
          turns the gradient      a view of b,
          of rows into dW         without a copy

On a GPU, a product adds a bias of one row at no cost, but it copies a matrix of rows first. There the product adds b
itself, and `rows` is b - b: zeros that are there for their gradient alone.

The weights, biases and rows are arguments of the function that is compiled, so the cell must take them from there and
not from its layers. It does so by calling `linear(layer, x)`. A scan finds out by itself which layers a cell applies,
and in which order: it runs one step when it is made. A later step that applies other layers, or another order, is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from shared.model.rssm import Belief

# Measured on the processors named in docs/faster.md.
CACHED_ROWS = 2500  # on the CPU, products over more rows than this do not fit in the cache
FEW_ROWS = 10  # on the CPU, a product of fewer rows is faster in float32 than in bfloat16
MANY_ROWS = 4096  # with more rows in all steps, each call gets its weight gradients: joining the inputs would cost more
STEPS_PER_CALL = 10  # steps that are compiled as one function: with few rows, a call costs more than its arithmetic

OTHER_LAYERS = (
    "a step applied other linear layers than when the scan was made; expected the same layers in the same order in "
    "every step; make a new scan if the cell has changed"
)

Cell: TypeAlias = Callable[..., Any]  # cell(belief, *inputs of a step, linear=...) returns a tuple with a `belief`
Row: TypeAlias = tuple[int, nn.Linear, Tensor]  # position of a layer in a step, the layer, and its row of biases


def bias_in_product(x: Tensor) -> bool:
    """Return whether a product on the device of `x` adds a bias of one row at no cost, but copies a matrix of rows."""
    return x.is_cuda


def unroll(cell: Cell, belief: Belief, inputs: Sequence[Tensor]) -> Any:
    """Call `cell(belief, *inputs of the step)` for every step, and return the results, stacked as (N, T, ...).

    The `belief` of a result goes into the next step. Shapes: belief (N, ...), inputs (T, N, ...).
    """
    results: list[Any] = []
    # Unbind instead of indexing: the gradient of an index is a tensor of zeros of full size, made in every step.
    for step_inputs in zip(*(x.unbind(0) for x in inputs), strict=True):
        results.append(cell(belief, *step_inputs))
        belief = results[-1].belief
    return pytree.tree_map(lambda *steps: torch.stack(steps, 1), *results)


def layers_in_order(cell: Cell, belief: Belief, inputs: Sequence[Tensor]) -> list[nn.Linear]:
    """Run one step of the cell and return the linear layers that it applied, in order. Shapes: as for one step."""
    layers: list[nn.Linear] = []

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        layers.append(layer)
        return layer(x)

    with torch.no_grad():
        cell(belief, *inputs, linear=linear)
    return layers


class _WeightGradient(torch.autograd.Function):
    """The identity on a layer's rows. Its backward computes the gradient of the weight from the kept `inputs`."""

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
    """Does what `unroll` does for one cell, with the same results and gradients, in a few calls of compiled code.

    Weights that require a gradient get it as the head of this file describes. The others are constants.
    """

    def __init__(
        self,
        cell: Cell,
        belief: Belief,
        inputs: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """Run one step of the cell to find its layers.

        belief, inputs: what one step takes, of any number of rows and any values; dtype: of the matrix products;
        compiled: wraps the function that computes several steps.
        """
        self._layers = layers_in_order(cell, belief, inputs)
        assert self._layers, "the cell applies no layer by `linear`, so there is nothing to scan"
        self._learned = [layer.weight.requires_grad for layer in self._layers]
        self._weights = [layer.weight.detach() for layer in self._layers]
        self._cast = self._weights if dtype == torch.float32 else [weight.to(dtype) for weight in self._weights]
        self._steps = compiled(_steps_of(cell, self._layers, self._learned))

    def __call__(self, belief: Belief, inputs: Sequence[Tensor]) -> Any:
        """Return what `unroll` returns, with the present weights. Take the gradients before the next call."""
        num_steps, num_rows = inputs[0].shape[:2]
        weights = self._present_weights(num_rows)
        # It requires a gradient like all later beliefs, so that one compiled function serves every call.
        belief = Belief(*(part.detach().requires_grad_(torch.is_grad_enabled()) for part in belief))
        biases = tuple(_bias(layer).detach().to(weights[0].dtype) for layer in self._layers)
        size = _steps_per_call(num_steps)
        group = num_steps if num_steps * num_rows < MANY_ROWS else size
        results: list[Any] = []
        for group_inputs in zip(*(x.split(group) for x in inputs), strict=True):
            kept: list[list[Tensor]] = [[] for _ in self._layers]
            lead, dtype = (group_inputs[0].shape[0], num_rows), weights[0].dtype
            rows = [self._rows(index, lead, kept[index], dtype) for index in range(len(self._layers))]
            for pieces in zip(*(_split(x, size) for x in (*rows, *group_inputs)), strict=True):
                call_rows, call_inputs = pieces[: len(rows)], pieces[len(rows) :]
                part, belief, layer_inputs = self._steps(weights, biases, call_rows, belief, call_inputs)
                results.append(part)
                for all_inputs, x in zip(kept, layer_inputs, strict=True):
                    all_inputs.append(x)
        return pytree.tree_map(lambda *parts: torch.cat(parts, 1), *results)

    def _present_weights(self, num_rows: int) -> tuple[Tensor, ...]:
        """Return the weights in the dtype of the products."""
        if self._cast is self._weights or (num_rows < FEW_ROWS and not self._weights[0].is_cuda):
            return tuple(self._weights)
        torch._foreach_copy_(self._cast, self._weights)  # pyright: ignore[reportPrivateImportUsage]
        return tuple(self._cast)

    def _rows(self, index: int, lead: tuple[int, int], inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the bias of a layer, or on a GPU zeros, for every step and row: (T, N, out), without a copy.

        inputs: the list that will hold the layer's inputs when the backward pass reads it.
        """
        layer = self._layers[index]
        bias = _bias(layer) if self._learned[index] else _bias(layer).detach()
        rows = (bias - bias.detach() if bias_in_product(bias) else bias).to(dtype).expand(*lead, -1)
        return cast(Tensor, _WeightGradient.apply(rows, layer.weight, inputs)) if self._learned[index] else rows


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _steps_per_call(num_steps: int) -> int:
    """Return a number of steps that divides `num_steps` if possible: a shorter last call is compiled separately."""
    sizes = range(STEPS_PER_CALL, STEPS_PER_CALL // 2 - 1, -1)
    return next((size for size in sizes if num_steps % size == 0), STEPS_PER_CALL)


def _split(x: Tensor, size: int) -> Sequence[Tensor]:
    """Split along the steps. One part is returned as it is, because the gradient of a split is a copy."""
    return (x,) if x.shape[0] <= size else x.split(size)


def _steps_of(cell: Cell, layers: Sequence[nn.Linear], learned: Sequence[bool]) -> Callable[..., Any]:
    """Return a function that computes several steps of the cell, with weights, biases and rows as arguments.

    It returns the stacked results, the last belief, and for each layer the inputs of all its products (k * N, in),
    detached; these are empty for a layer that is not learned.
    """

    def steps(
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor, ...],
        rows: tuple[Tensor, ...],
        belief: Belief,
        inputs: tuple[Tensor, ...],
    ) -> tuple[Any, Belief, list[Tensor]]:
        layer_inputs: list[list[Tensor]] = [[] for _ in weights]
        expected = _rows_in_order(layers, rows)

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            index, row = _next_row(expected, layer)
            x = x.to(weights[index].dtype)
            if learned[index]:
                layer_inputs[index].append(x.detach())
            return _affine(x, weights[index], biases[index], row, learned=learned[index])

        with torch.autocast(weights[0].device.type, enabled=False):  # everything is cast already
            results = unroll(partial(cell, linear=linear), belief, inputs)
        if expected:
            raise RuntimeError(OTHER_LAYERS)
        last = Belief(*(part[:, -1] for part in results.belief))
        return results, last, [torch.cat(xs) if xs else weights[0].new_empty(0) for xs in layer_inputs]

    return steps


def _rows_in_order(layers: Sequence[nn.Linear], rows: Sequence[Tensor]) -> list[Row]:
    """Return the rows of all steps and layers, in the reverse of the order in which the cell will ask for them."""
    of_steps = zip(*(of_layer.unbind(0) for of_layer in rows), strict=True)
    ordered = [(index, layers[index], row) for step_rows in of_steps for index, row in enumerate(step_rows)]
    ordered.reverse()
    return ordered


def _next_row(expected: list[Row], layer: nn.Linear) -> tuple[int, Tensor]:
    """Take the next row off the end of `expected` and return it with its layer's position in the step.

    If the function is compiled, it checks the layer while it is traced, and this costs nothing later.
    """
    if not expected or layer is not expected[-1][1]:
        raise RuntimeError(OTHER_LAYERS)
    index, _, row = expected.pop()
    return index, row


def _affine(x: Tensor, weight: Tensor, bias: Tensor, row: Tensor, *, learned: bool) -> Tensor:
    """Return x W' + b in such a way that its gradient reaches `row`. Shapes: x (N, in), row (N, out)."""
    if not bias_in_product(x):
        return torch.addmm(row, x, weight.t())
    product = torch.addmm(bias, x, weight.t())
    return product + row if learned else product
