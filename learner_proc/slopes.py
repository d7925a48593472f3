"""A scalar head read together with its slope, so that one reading serves every loss that looks at it.

The head gives one number v for each feature, so whatever gradient g a loss has for v, everything below it is g times the
same row: dL/dfeat = g * dv/dfeat, and dL/dW = [g * dv/dy]' [x] for every layer y = x W' + b. Autograd would walk through
the critic twice forwards and twice backwards, for the actor's loss and for its own; here it is once each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.model.layers import BACKWARDS


class Reading(NamedTuple):
    """What a head said of M features, and the rows its gradients are made of.

    value (M,) float32; slope (M, F), dv/dfeat; per layer `inputs` (M, in) and, without the last one's ones, `slopes`
    (M, out), dv/dy. Nothing of it carries a gradient.
    """

    value: Tensor
    slope: Tensor
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


@torch.no_grad()
def read_head(layers: nn.Sequential, feat: Tensor, dtype: torch.dtype) -> Reading:
    """Read a stack of activated linear layers with one output. Shapes: feat (M, F); products in `dtype`."""
    x, inputs, slopes = feat.to(dtype), [], []
    weights = [layer.weight.to(dtype) for layer in layers if isinstance(layer, nn.Linear)]
    activations: list[tuple[nn.Module, Tensor, Tensor]] = []
    for layer in layers:
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
    return Reading(x.float().squeeze(-1), slope, tuple(inputs), tuple(reversed(slopes)))


@torch.no_grad()
def weight_gradients(reading: Reading, grad: Tensor) -> list[Tensor]:
    """The float32 gradients of a head's weights and biases, in the order of its parameters. Shapes: grad (M,), dL/dv."""
    grads: list[Tensor] = []
    row = grad[:, None].to(reading.slope.dtype)
    for x, slope in zip(reading.inputs, reading.slopes, strict=False):  # the last layer's slope is one
        scaled = slope * row
        grads += [(scaled.t() @ x).float(), scaled.sum(0, dtype=torch.float32)]
    return [*grads, (row.t() @ reading.inputs[-1]).float(), grad.sum()[None]]
