"""A scalar head read together with its slope, so that one reading serves every loss that looks at it.

The head gives one number v for each feature, so whatever gradient g a loss has for v, everything below it is g times the
same row: dL/dfeat = g * dv/dfeat, and dL/dW = [g * dv/dy]' [x] for every layer y = x W' + b. Autograd would walk through
the critic twice forwards and twice backwards, for the actor's loss and for its own; here it is once each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner_proc.heads import read_out
from learner_proc.scan import CACHED_ROWS
from shared.model.layers import BACKWARDS


class Block(NamedTuple):
    """What a head said of M features, and the rows its gradients are made of; nothing of it carries a gradient.

    value (M,) float32; slope (M, F), dv/dfeat; of a head that learns, per layer `inputs` (M, in) and, without the last
    one's ones, `slopes` (M, out), dv/dy.
    """

    value: Tensor
    slope: Tensor
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


class Reading(NamedTuple):
    """value (M,) float32 and slope (M, F) of all features; the blocks they were read in, in order."""

    value: Tensor
    slope: Tensor
    blocks: tuple[Block, ...]


class HeadReader:
    """Reads scalar heads: stacks of activated linear layers with one output. Products in `dtype`."""

    def __init__(self, dtype: torch.dtype, *, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._dtype = dtype
        self._read_block, self._block_gradients = compiled(_read_block), compiled(_block_gradients)
        self._join = compiled(_join)

    def read(self, layers: nn.Sequential, feat: Tensor, *, learned: bool) -> Reading:
        """`learned`: keep what `weight_gradients` needs. Shapes: feat (M, F)."""
        rows = feat.shape[0]
        if not feat.is_cuda:  # equal blocks if it can be, so that one compiled form serves them all
            fewest = -(-rows // CACHED_ROWS)
            rows //= next((n for n in range(fewest, 2 * fewest + 1) if rows % n == 0), 1)
        with torch.no_grad():
            blocks = tuple(self._read_block(layers, part, self._dtype, learned) for part in feat.split(rows))
        if len(blocks) == 1:
            return Reading(blocks[0].value, blocks[0].slope, blocks)
        return Reading(torch.cat([b.value for b in blocks]), torch.cat([b.slope for b in blocks]), blocks)

    def weight_gradients(self, reading: Reading, grad: Tensor) -> list[Tensor]:
        """The float32 gradients of a head's weights and biases, in the order of its parameters. Shapes: grad (M,), dL/dv."""
        parts = grad.split(reading.blocks[0].value.shape[0])
        with torch.no_grad():
            total, *rest = [self._block_gradients(*pair) for pair in zip(reading.blocks, parts, strict=True)]
        for grads in rest:
            torch._foreach_add_(total, grads)  # pyright: ignore[reportPrivateImportUsage]
        return total

    def feat_gradient(self, readings: list[Reading], grads: list[Tensor]) -> Tensor:
        """dL/dfeat (M, F) float32, from what several heads said of the same features and dL/dv (M,) of each."""
        with torch.no_grad():
            return self._join([reading.slope for reading in readings], grads)


def _read_block(layers: nn.Sequential, feat: Tensor, dtype: torch.dtype, learned: bool) -> Block:
    x, inputs, slopes = feat.to(dtype), [], []
    weights = [layer.weight.to(dtype) for layer in layers if isinstance(layer, nn.Linear)]
    activations: list[tuple[nn.Module, Tensor, Tensor]] = []
    *hidden, last = layers
    assert isinstance(last, nn.Linear)
    for layer in hidden:
        if isinstance(layer, nn.Linear):
            inputs.append(x)
            x = F.linear(x, weights[len(inputs) - 1], layer.bias.to(dtype))
        else:
            activations.append((layer, x, layer(x)))
            x = activations[-1][-1]
    slope = weights[-1].expand(x.shape[0], -1)  # (1, hidden): the same for every row
    for weight, (layer, before, after) in zip(reversed(weights[:-1]), reversed(activations), strict=True):
        slopes.append(BACKWARDS[type(layer)](slope, before, after))
        slope = slopes[-1] @ weight
    kept = ((*inputs, x), tuple(reversed(slopes))) if learned else ((), ())
    return Block(read_out(last, x), slope, *kept)


def _block_gradients(block: Block, grad: Tensor) -> list[Tensor]:
    grads: list[Tensor] = []
    row = grad[:, None].to(block.slope.dtype)
    for x, slope in zip(block.inputs, block.slopes, strict=False):  # the last layer's slope is one
        scaled = slope * row
        grads += [(scaled.t() @ x).float(), scaled.sum(0, dtype=torch.float32)]
    return [*grads, (row.t() @ block.inputs[-1]).float(), grad.sum()[None]]


def _join(slopes: list[Tensor], grads: list[Tensor]) -> Tensor:
    total = slopes[0].float() * grads[0][:, None]
    for slope, grad in zip(slopes[1:], grads[1:], strict=True):
        total = total + slope.float() * grad[:, None]
    return total
