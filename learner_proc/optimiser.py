"""One of the three optimisers: Adam with gradient clipping. It skips steps whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_INTERVAL = 2000  # finite steps between two doublings
NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class LossScale:
    """The factor on a loss that keeps its float16 gradients in range. It changes on the device, without a wait."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_LOSS_SCALE, device=device)
        self.num_finite = torch.zeros((), device=device)

    def update(self, bad: Tensor) -> None:
        """Halve the factor after a bad step; double it after `LOSS_SCALE_INTERVAL` good steps in a row.

        Shapes: bad () bool.
        """
        num_finite = (self.num_finite + 1).masked_fill(bad, 0.0)
        grow = num_finite >= LOSS_SCALE_INTERVAL
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self.num_finite.copy_(num_finite.masked_fill(grow, 0.0))


def limit(norm: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether the norm is not finite, the same as a number, and what to divide the gradients by to clip them.

    Shapes: all ().
    """
    bad = ~torch.isfinite(norm)
    return bad, bad.float(), ((norm + NORM_EPS) / clip).clamp_min(1.0)


class Optimiser:
    """Adam over a fixed list of parameters. It clips the global norm of the gradients.

    If a gradient is not finite, the step is skipped by a flag on the device, without a wait.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        eps: float,
        clip: float,
        scaled: bool,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        """scaled: whether the loss has a scale, as float16 needs; compiled: compiles a function."""
        self.params, self.clip, self._limit = list(params), clip, compiled(limit)
        device = self.params[0].device
        self.optimizer = torch.optim.Adam(self.params, lr=lr, eps=eps, fused=True, capturable=device.type == "cuda")
        self.loss_scale = LossScale(device) if scaled else None
        # Adam would create its state in the first step. It must exist before, so that its addresses never change.
        for param in self.params:
            self.optimizer.state[param] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate. `apply` divides its gradients by the same scale."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def apply(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Clip the gradients of the `scaled` loss and update the parameters in place.

        Return the norm before clipping, (), and whether the step was skipped, () bool.
        """
        if self.loss_scale is not None:
            torch._foreach_div_(grads, self.loss_scale.scale)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.nn.utils.get_total_norm(grads)
        bad, found_inf, divisor = self._limit(norm, self.clip)
        for param, grad in zip(self.params, grads, strict=True):
            # The gradient of a convolution has the memory layout of its input, but the fused kernels read parameters,
            # moments and gradients in the order of memory. So copy it into the parameter's layout.
            param.grad = grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
        # The fused kernels divide the gradients by this number, so clipping needs no pass of its own.
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        # They also read this flag. If it is set, parameters, moments and step count stay as they are.
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale is not None:
            self.loss_scale.update(bad)
        return norm, bad

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of Adam, by name: everything that a step changes, except for the parameters."""
        return {
            f"{index}.{key}": value
            for index, param in enumerate(self.params)
            for key, value in self.optimizer.state[param].items()
        }
