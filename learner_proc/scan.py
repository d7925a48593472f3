"""Unroll a recurrent cell over time in a few calls of compiled code.

A scan gives the results and gradients that `unroll` gives. It is faster in three ways:

    - The weights are constants, which are cast once, and their gradients are computed once for many steps:
      `learner_proc.products` explains how.
    - About ten steps are compiled as one function.
    - Results, and gradients of inputs, are joined outside of that function, each by one kernel for all steps.

The weights are arguments of the function that is compiled, so the cell must take them from there and not from its
layers. It does so by calling `linear(layer, x)`. A scan finds out by itself which layers a cell applies, and in which
order: it runs one step when it is made. A later step that applies other layers, or another order, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from learner_proc.products import Extra, Parts, Recorder, StepProducts, Weights, addends_of, joint_product
from shared.model.rssm import Belief

FEW_ROWS = 10  # on the CPUs of docs/faster.md, a product of fewer rows is faster in float32 than in bfloat16
STEPS_PER_CALL = 10  # steps that are compiled as one function: with few rows, a call costs more than its arithmetic

Cell: TypeAlias = Callable[..., Any]  # cell(belief, *inputs of a step, linear=...) returns a tuple with a `belief`


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


def record(cell: Cell, belief: Any, inputs: Sequence[Tensor], recorder: Recorder) -> Recorder:
    """Run one step of the cell and return what was applied. Shapes: as for one step."""
    with torch.no_grad():
        cell(belief, *inputs, linear=recorder)
    return recorder


def layers_in_order(cell: Cell, belief: Belief, inputs: Sequence[Tensor]) -> list[nn.Linear]:
    """Run one step of the cell and return the linear layers that it applied, in order. Shapes: as for one step."""
    return record(cell, belief, inputs, Recorder()).layers


class Scan:
    """Does what `unroll` does for one cell, with the same results and gradients, in a few calls of compiled code.

    Weights that require a gradient get it as `learner_proc.products` describes. The others are constants.
    """

    def __init__(
        self,
        cell: Cell,
        belief: Any,
        inputs: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
        select: Callable[[Any], Any] = lambda result: result,
        num_known: dict[nn.Linear, int] | None = None,
    ) -> None:
        """Run one step of the cell to find its layers.

        belief, inputs: what one step takes, of any number of rows and any values. dtype: of the matrix products.
        compiled: wraps the function that computes several steps. select: what to return of a step's result. num_known:
        for a layer, how many of its last input columns are given to each call as `Extra.known`.
        """
        recorder = record(cell, belief, inputs, Recorder(num_known or {}))
        self._layers, self._joint = recorder.layers, recorder.joint
        assert self._layers, "the cell applies no layer by `linear`, so there is nothing to scan"
        self._learned = [layer.weight.requires_grad for layer in self._layers]
        self._num_known = recorder.num_known
        self._params = [layer.weight.detach() for layer in self._layers] + [_bias(layer) for layer in self._layers]
        self._cast = self._params if dtype == torch.float32 else [param.to(dtype) for param in self._params]
        self._steps = compiled(_steps_of(cell, self._layers, self._joint, select))

    def __call__(
        self,
        belief: Any,
        inputs: Sequence[Tensor],
        *,
        extra: dict[nn.Linear, Extra] | None = None,
        begin: Callable[[Any, Callable[..., list[Parts]]], Any] = lambda belief, shared: belief,
    ) -> Any:
        """Return what `unroll` returns. Take the gradients before the next call, which overwrites the cast weights.

        extra: what is known about the layers' outputs. begin: returns what the first step takes, from `belief` and a
        function like `Products.shared`.
        """
        num_steps, num_rows = inputs[0].shape[:2]
        weights = self._present_weights(num_rows)
        with torch.no_grad(), torch.autocast(weights.biases[0].device.type, enabled=False):
            belief = begin(belief, partial(self._shared, weights))
        # The first belief requires a gradient, like all later beliefs, so that one compiled function serves every call.
        learns = torch.is_grad_enabled()
        belief = pytree.tree_map(lambda part: part.detach().requires_grad_(learns), belief)
        kept: list[list[Tensor]] = [[] for _ in self._layers]
        shape, dtype = (num_steps, num_rows), weights.layers[0].dtype
        addends = [
            addends_of(layer, (extra or {}).get(layer, Extra()), shape=shape, dtype=dtype, inputs=own)
            if learned
            else ()
            for layer, learned, own in zip(self._layers, self._learned, kept, strict=True)
        ]
        results: list[Any] = []
        step_inputs = [x.unbind(0) for x in inputs]
        size = _steps_per_call(num_steps)
        for start in range(0, num_steps, size):
            now = slice(start, start + size)
            parts, belief, layer_inputs = self._steps(
                weights, tuple(of_layer[now] for of_layer in addends), belief, tuple(x[now] for x in step_inputs)
            )
            results += parts
            for all_inputs, xs in zip(kept, layer_inputs, strict=True):
                all_inputs += xs
        return pytree.tree_map(lambda *steps: _Stack.apply(*steps), *results)

    def _present_weights(self, num_rows: int) -> Weights:
        """Return the weights in the dtype of the products."""
        tensors, count = self._params, len(self._layers)
        if self._cast is not self._params and (num_rows >= FEW_ROWS or self._params[0].is_cuda):
            tensors = self._cast
            torch._foreach_copy_(tensors, self._params)  # pyright: ignore[reportPrivateImportUsage]
        weights = dict(zip(self._layers, tensors[:count], strict=True))
        joint = tuple(torch.cat([weights[layer] for layer in layers]) for layers in self._joint)
        unknown = (w[:, : w.shape[1] - self._num_known.get(layer, 0)] for layer, w in weights.items())
        used = dict(zip(weights, unknown, strict=True))
        return Weights(tuple(used[layer] for layer in self._layers), tuple(tensors[count:]), joint)

    def _shared(self, weights: Weights, x: Tensor, *layers: tuple[nn.Linear, int]) -> list[Parts]:
        index = self._joint.index(tuple(layer for layer, _ in layers))
        return joint_product(x, weights.joint[index], [num for _, num in layers])


class _Stack(torch.autograd.Function):
    """Stacks the results of all steps as (N, T, ...). Its backward makes one copy, so every gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, *steps: Tensor) -> Tensor:
        return torch.stack(steps, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].transpose(0, 1).contiguous().unbind(0)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def _steps_per_call(num_steps: int) -> int:
    """Return a number of steps that divides `num_steps` if possible: a shorter last call is compiled separately."""
    sizes = range(STEPS_PER_CALL, STEPS_PER_CALL // 2 - 1, -1)
    return next((size for size in sizes if num_steps % size == 0), STEPS_PER_CALL)


def _steps_of(
    cell: Cell, layers: Sequence[nn.Linear], joint: Sequence[tuple[nn.Linear, ...]], select: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return a function that computes several steps of the cell, with weights and addends as arguments.

    It returns the selected results of all steps, the last belief, and for each layer the inputs of all its products
    (N, in), detached; none for a layer that is not learned.
    """

    def steps(
        weights: Weights, addends: tuple[Parts, ...], belief: Any, inputs: tuple[Parts, ...]
    ) -> tuple[list[Any], Any, list[list[Tensor]]]:
        products = StepProducts(layers, joint, weights, addends)
        results: list[Any] = []
        with torch.autocast(weights.layers[0].device.type, enabled=False):  # everything is cast already
            for step_inputs in zip(*inputs, strict=True):
                result = cell(belief, *step_inputs, linear=products)
                products.next_step()
                results.append(select(result))
                belief = result.belief
        # On a CPU, each tensor that passes between calls costs time, and joining these costs none while they are made.
        kept = products.inputs
        return results, belief, kept if weights.biases[0].is_cuda else [[torch.cat(xs)] if xs else [] for xs in kept]

    return steps
