"""Evaluate a scalar head together with its derivatives, so that one evaluation serves several losses.

A head maps each of M features to one number v (reward, value, continue logit). Because v is a single number, everything
below it has a derivative of the shape of one feature or one activation, the same for every loss:

    feat ── W1 ── y1 ── elu ── W2 ── y2 ── elu ── W3 ── v
          x1               x2               x3           x_i: input of layer i, kept by the forward pass
     <── dv/dfeat <── dv/dy1 <────── dv/dy2 <────── 1    the slopes, computed once, right after the forward pass

A loss L contributes only g = dL/dv, one number per feature:

    dL/dfeat = g * dv/dfeat             dL/dW_i = [g * dv/dy_i]' x_i

The actor's loss needs dL/dfeat of all heads, and the critic's loss needs dL/dW of the critic on the same features.
Autograd would run the critic forwards and backwards twice, once for each loss. Here it runs once in each direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner_proc.heads import scalar_output
from learner_proc.products import CACHED_ROWS

# The gradient at an activation's input, from the gradient at its output, its input x and its output y.
ACTIVATION_BACKWARD: dict[type[nn.Module], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    nn.ELU: lambda grad, x, y: torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, y),
    nn.ReLU: lambda grad, x, y: torch.ops.aten.threshold_backward(grad, y, 0.0),
    nn.SiLU: lambda grad, x, y: torch.ops.aten.silu_backward(grad, x),
}


class Block(NamedTuple):
    """A head evaluated on M features, without gradients.

    value (M,) float32; slope (M, F) is dv/dfeat. For weight gradients also, per layer, `inputs` (M, in) and, for all
    layers but the last, `slopes` (M, out), which is dv/dy. (The last layer's slope is 1.)
    """

    value: Tensor
    slope: Tensor
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


class Evaluation(NamedTuple):
    """value (M,) float32 and slope (M, F) of all features, and the blocks in which they were computed, in order."""

    value: Tensor
    slope: Tensor
    blocks: tuple[Block, ...]


class HeadEvaluator:
    """Evaluates scalar heads: stacks of linear layers and activations that end in one number."""

    def __init__(self, dtype: torch.dtype, *, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """dtype: the type in which products are computed. compiled: compiles a function, or returns it unchanged."""
        self._dtype = dtype
        self._evaluate_block, self._block_gradients = compiled(_evaluate_block), compiled(_block_gradients)
        self._join = compiled(_join)

    def evaluate(self, layers: nn.Sequential, feat: Tensor, *, for_weights: bool) -> Evaluation:
        """Return the head's values and slopes. for_weights: keep what `weight_gradients` needs. Shapes: feat (M, F)."""
        rows = feat.shape[0]
        if not feat.is_cuda:
            # Blocks that fit in the cache, and of equal size if possible, so that one compiled form serves them all.
            fewest = -(-rows // CACHED_ROWS)
            rows //= next((n for n in range(fewest, 2 * fewest + 1) if rows % n == 0), 1)
        with torch.no_grad():
            blocks = tuple(self._evaluate_block(layers, part, self._dtype, for_weights) for part in feat.split(rows))
        if len(blocks) == 1:
            return Evaluation(blocks[0].value, blocks[0].slope, blocks)
        return Evaluation(torch.cat([b.value for b in blocks]), torch.cat([b.slope for b in blocks]), blocks)

    def weight_gradients(self, evaluation: Evaluation, grad: Tensor) -> list[Tensor]:
        """Return the float32 gradients of a head's weights and biases, in the order of its parameters.

        Shapes: grad (M,) is dL/dv.
        """
        parts = grad.split(evaluation.blocks[0].value.shape[0])
        with torch.no_grad():
            total, *rest = [self._block_gradients(*pair) for pair in zip(evaluation.blocks, parts, strict=True)]
        for grads in rest:
            torch._foreach_add_(total, grads)  # pyright: ignore[reportPrivateImportUsage]
        return total

    def feat_gradient(self, evaluations: list[Evaluation], grads: list[Tensor]) -> Tensor:
        """Return dL/dfeat (M, F) in float32, summed over several heads of the same features.

        Shapes: grads (M,) each.
        """
        with torch.no_grad():
            return self._join([evaluation.slope for evaluation in evaluations], grads)


def _evaluate_block(layers: nn.Sequential, feat: Tensor, dtype: torch.dtype, for_weights: bool) -> Block:
    """Run the layers forwards, then compute the slopes from the last layer to the first."""
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
    slope = weights[-1].expand(x.shape[0], -1)  # the last layer's weight (1, hidden) is the slope of every row
    for weight, (layer, before, after) in zip(reversed(weights[:-1]), reversed(activations), strict=True):
        slopes.append(ACTIVATION_BACKWARD[type(layer)](slope, before, after))
        slope = slopes[-1] @ weight
    kept = ((*inputs, x), tuple(reversed(slopes))) if for_weights else ((), ())
    return Block(scalar_output(last, x), slope, *kept)


def _block_gradients(block: Block, grad: Tensor) -> list[Tensor]:
    """Return the gradients of all weights and biases, layer by layer. Shapes: grad (M,) is dL/dv."""
    grads: list[Tensor] = []
    row = grad[:, None].to(block.slope.dtype)
    *hidden, last = block.inputs  # the last has no slope; torch 2.7 compiles zip for equal lengths only
    for x, slope in zip(hidden, block.slopes, strict=True):
        scaled = slope * row
        grads += [(scaled.t() @ x).float(), scaled.sum(0, dtype=torch.float32)]
    return [*grads, (row.t() @ last).float(), grad.sum()[None]]


def _join(slopes: list[Tensor], grads: list[Tensor]) -> Tensor:
    total = slopes[0].float() * grads[0][:, None]
    for slope, grad in zip(slopes[1:], grads[1:], strict=True):
        total = total + slope.float() * grad[:, None]
    return total
