"""The matrix products of an unrolled cell: forward in every step, and one weight gradient for many steps.

A cell applies a few linear layers in every step, y_t = x_t W' + b, to N rows at a time. Plain autograd differentiates
every step by itself:

    step        1                2               ...    T
    forward     y_1 = x_1 W'+b   y_2 = x_2 W'+b         y_T = x_T W'+b
    backward    dW = dy_1' x_1   +  dy_2' x_2    + ...  +  dy_T' x_T

These are T thin products and T - 1 sums of whole matrices for each layer. Here a step multiplies by a constant copy of
the weight, and the input of every step is kept. One product over all T * N rows then gives the same gradient:

    dW = [dy_1; dy_2; ...; dy_T]' [x_1; x_2; ...; x_T]       db = the sum of all rows of dy

Autograd has to bring dy_1 .. dy_T to that product. They travel through what is added to the products, because its
gradient is the product's own gradient:

    weight, bias ──> _Addends ──> one matrix (N, out) for each step, which the step adds to x_t W'
                     turns their gradients into dW and db

What is added is the bias, and everything else that is known before the first step:

    y_t = [x_t, known_t] W' + b + share_t  =  x_t W_x'  +  (known_t W_known' + b + share_t)
                                              in the step    in one product for all steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED_ROWS = 2500  # measured on the CPUs of docs/faster.md: products over more rows than this do not fit in the cache
JOINED_ROWS = 2**16  # on a GPU, a product over as many rows fills it, so joining more of them would only cost copies

OTHER_LAYERS = (
    "a step applied other linear layers than when the scan was made; expected the same layers in the same order in "
    "every step; make a new scan if the cell has changed"
)

Parts: TypeAlias = tuple[Tensor, ...]  # the output of a layer, split into equal parts along its last dimension


class Products(Protocol):
    """How a cell applies its layers."""

    def __call__(self, layer: nn.Linear, *xs: Tensor) -> Tensor:
        """Apply a layer to `xs`, joined along their last dimension. Shapes: xs (N, ...); the result is (N, out)."""
        ...

    def parts(self, layer: nn.Linear, x: Tensor, num: int) -> Parts:
        """Apply a layer and return its output in equal parts, `num` of (N, out / num)."""
        ...

    def shared(self, x: Tensor, *layers: tuple[nn.Linear, int]) -> list[Parts]:
        """Return x W' of several layers that have the same input, from one product.

        Nothing is added yet: pass the result to `add`. layers: each with the number of its parts, which are of equal
        size over all layers.
        """
        ...

    def add(self, layer: nn.Linear, x: Tensor, product: Parts) -> Parts:
        """Complete a product of `shared`. x: the input that the layer has; the product belongs to it."""
        ...


class Extra(NamedTuple):
    """What is known before the first step about the output of a layer.

    known: the last columns of its input, without gradient; share: what is added to its output. Shapes: known
    (T, N, k), share (T, N, out).
    """

    known: Tensor | None = None
    share: Tensor | None = None


@dataclass
class Recorder:
    """Applies layers plainly and records them: `layers` in the order of the steps' additions, `joint` of `shared`.

    num_known: for a layer, how many of its last input columns are known before the first step.
    """

    num_known: dict[nn.Linear, int] = field(default_factory=dict)
    layers: list[nn.Linear] = field(default_factory=list)
    joint: list[tuple[nn.Linear, ...]] = field(default_factory=list)

    def __call__(self, layer: nn.Linear, *xs: Tensor) -> Tensor:
        """See `Products`."""
        return self.parts(layer, torch.cat(xs, -1), 1)[0]

    def parts(self, layer: nn.Linear, x: Tensor, num: int) -> Parts:
        """See `Products`."""
        self.layers.append(layer)
        width = layer.in_features - self.num_known.get(layer, 0)
        return F.linear(x, layer.weight[:, :width], layer.bias).chunk(num, -1)

    def shared(self, x: Tensor, *layers: tuple[nn.Linear, int]) -> list[Parts]:
        """See `Products`."""
        self.joint.append(tuple(layer for layer, _ in layers))
        return [F.linear(x, layer.weight).chunk(num, -1) for layer, num in layers]

    def add(self, layer: nn.Linear, x: Tensor, product: Parts) -> Parts:
        """See `Products`."""
        self.layers.append(layer)
        return product


def splits_products(x: Tensor) -> bool:
    """Return whether to split a product before anything is added to it: in code that is compiled for a GPU.

    The compiler then puts everything between two products into kernels of one size. Elsewhere one call that multiplies
    and adds is faster.
    """
    return x.is_cuda and torch.compiler.is_compiling()


class Weights(NamedTuple):
    """What the steps multiply by, in the dtype of the products: weights and biases of the layers, and joint weights."""

    layers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    joint: tuple[Tensor, ...]


class StepProducts:
    """The products of several steps, which are compiled as one function.

    addends: for each layer and step, what is added to the product (N, out); empty for a layer that is not learned.
    `inputs` collects the inputs of each learned layer, detached.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        joint: Sequence[tuple[nn.Linear, ...]],
        weights: Weights,
        addends: Sequence[Parts],
    ) -> None:
        self._layers, self._joint, self._weights, self._addends = layers, joint, weights, addends
        self._index = self._joint_index = self._step = 0
        self.inputs: list[list[Tensor]] = [[] for _ in layers]

    def next_step(self) -> None:
        """Check that a step has applied all layers. Raises: RuntimeError if it has not."""
        if self._index != len(self._layers) or self._joint_index != len(self._joint):
            raise RuntimeError(OTHER_LAYERS)
        self._index, self._joint_index, self._step = 0, 0, self._step + 1

    def __call__(self, layer: nn.Linear, *xs: Tensor) -> Tensor:
        """See `Products`."""
        dtype = self._weights.biases[0].dtype
        x = xs[0] if len(xs) == 1 else torch.cat([x.to(dtype) for x in xs], -1)
        return self.parts(layer, x, 1)[0]

    def parts(self, layer: nn.Linear, x: Tensor, num: int) -> Parts:
        """See `Products`."""
        index, addend = self._next(layer)
        weight, bias = self._weights.layers[index], self._weights.biases[index]
        x = x.to(weight.dtype)
        if addend is None:
            return torch.addmm(bias, x, weight.t()).chunk(num, -1)
        self.inputs[index].append(x.detach())
        if splits_products(x):
            return _sums((x @ weight.t()).chunk(num, -1), addend)
        return torch.addmm(addend, x, weight.t()).chunk(num, -1)

    def shared(self, x: Tensor, *layers: tuple[nn.Linear, int]) -> list[Parts]:
        """See `Products`."""
        if self._joint_index == len(self._joint) or tuple(one for one, _ in layers) != self._joint[self._joint_index]:
            raise RuntimeError(OTHER_LAYERS)
        weight = self._weights.joint[self._joint_index]
        self._joint_index += 1
        return joint_product(x, weight, [num for _, num in layers])

    def add(self, layer: nn.Linear, x: Tensor, product: Parts) -> Parts:
        """See `Products`."""
        index, addend = self._next(layer)
        if addend is None:
            return _sums(product, self._weights.biases[index])
        self.inputs[index].append(x.detach().to(product[0].dtype))
        return _sums(product, addend)

    def _next(self, layer: nn.Linear) -> tuple[int, Tensor | None]:
        """Return the position of the layer in the step and what is added to it.

        If the function is compiled, it checks the layer while it is traced, and this costs nothing later.
        """
        if self._index == len(self._layers) or layer is not self._layers[self._index]:
            raise RuntimeError(OTHER_LAYERS)
        index, addends = self._index, self._addends[self._index]
        self._index += 1
        return index, addends[self._step] if addends else None


def joint_product(x: Tensor, weight: Tensor, nums: Sequence[int]) -> list[Parts]:
    """Return x W' in equal parts, `nums` of them for each layer whose weight is in the joint weight."""
    parts = list((x.to(weight.dtype) @ weight.t()).chunk(sum(nums), -1))
    return [tuple(parts.pop(0) for _ in range(num)) for num in nums]


def _sums(product: Parts, addend: Tensor) -> Parts:
    """Return product plus addend in float32, part by part. The gradient of the addend has its dtype."""
    return tuple(part.float() + more for part, more in zip(product, addend.chunk(len(product), -1), strict=True))


class _Addends(torch.autograd.Function):
    """What is added to a layer's product in each step. Its backward computes the gradients of the layer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, share: Tensor | None, call: _Call) -> Any:
        ctx.call, ctx.has_bias = call, bias is not None
        with torch.autocast(weight.device.type, enabled=False):
            return call.addends(weight, bias, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Call = ctx.call
        with torch.autocast(grads[0].device.type, enabled=False):
            weight, bias = call.gradients(grads, with_bias=ctx.has_bias)
        share = None
        if ctx.needs_input_grad[2]:
            share = torch.stack(grads)
        return weight, bias, share, None


@dataclass
class _Call:
    """One layer in one call of a scan.

    shape: (T, N). inputs: the list that will hold the layer's inputs (N, in) of all steps when the backward pass reads
    it. known: as in `Extra`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    inputs: list[Tensor]
    known: Tensor | None

    def addends(self, weight: Tensor, bias: Tensor | None, share: Tensor | None) -> Parts:
        """Return what is added in each step, T of (N, out)."""
        total = None if bias is None else bias.to(self.dtype)
        if self.known is not None:
            known = self.known.to(self.dtype)
            total = F.linear(known, weight[:, -known.shape[-1] :].to(self.dtype), total)
        if share is not None:
            share = share.to(self.dtype)
            total = share if total is None else total + share
        if total is None:
            total = weight.new_zeros(weight.shape[0], dtype=self.dtype)
        return total.expand(*self.shape, -1).unbind(0)

    def gradients(self, grads: Parts, *, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of weight and bias in float32, from the gradients of all steps (N, out)."""
        rows = JOINED_ROWS if grads[0].is_cuda else CACHED_ROWS
        size = max(1, rows // self.shape[1])  # steps whose rows are joined into one product
        weights, biases = [], []
        steps = self._inputs_of_steps(len(grads))
        for start in range(0, len(grads), size):
            grad, x = _joined(grads[start : start + size]), _joined(steps[start : start + size])
            if self.known is not None:
                x = torch.cat([x, self.known[start : start + size].flatten(0, 1).to(x.dtype)], -1)
            weights.append((grad.t() @ x).float())
            if with_bias:
                biases.append(grad.sum(0, dtype=torch.float32))
        return _total(weights), _total(biases) if with_bias else None

    def _inputs_of_steps(self, num_steps: int) -> Sequence[Tensor]:
        """Return the inputs (N, in) of each step, also if those of several steps came joined."""
        return self.inputs if len(self.inputs) == num_steps else torch.cat(self.inputs).split(self.shape[1])


def addends_of(
    layer: nn.Linear, extra: Extra, *, shape: tuple[int, int], dtype: torch.dtype, inputs: list[Tensor]
) -> Parts:
    """Return what is added to a learned layer's product in each step, T of (N, out).

    shape: (T, N). inputs: the list that will hold the layer's inputs of all steps when the backward pass reads it.
    """
    call = _Call(shape, dtype, inputs, extra.known)
    return cast(Parts, _Addends.apply(layer.weight, layer.bias, extra.share, call))


def _joined(steps: Sequence[Tensor]) -> Tensor:
    return steps[0] if len(steps) == 1 else torch.cat(list(steps))


def _total(terms: list[Tensor]) -> Tensor:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total
