"""Returns along imagined trajectories, and the scale they come in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOW, HIGH = 0.05, 0.95  # the percentiles a range of returns spans
RANGE_DECAY = 0.99


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, *, lam: float) -> Tensor:
    """Critic targets along imagined trajectories: all n-step returns, mixed by lam.

    The value of a step includes that step's reward, and its discount gates what comes after it. The last reward is not
    used: the last value stands for it. Example, H = 3, lam = 0.5, discount 0.9, reward [1, 2, 3], value [10, 20, 30]:
    R_2 = 2 + 0.9 * 30 = 29; R_1 = 1 + 0.9 * (0.5 * 20 + 0.5 * 29) = 23.05.

    Shapes: reward, discount (gamma times continue), value (N, H), of the step arrived at; result (N, H - 1).
    Units: scaled rewards.
    Raises: ValueError if lam lies outside [0, 1].
    Source: arXiv 1912.01603, eq. 6.
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(
            f"lam={lam} is not a mixing weight; expected a number from 0 to 1; set optimization.lmbda=0.95"
        )
    assert reward.shape == discount.shape == value.shape, (reward.shape, discount.shape, value.shape)
    assert reward.dim() == 2 and reward.shape[1] >= 2, reward.shape
    bootstrap = reward[:, :-1] + (1 - lam) * discount[:, :-1] * value[:, 1:]  # (N, H - 1)
    gate = lam * discount[:, :-1]
    returns = [value[:, -1]]
    for step, step_gate in zip(reversed(bootstrap.unbind(1)), reversed(gate.unbind(1)), strict=True):
        returns.append(step + step_gate * returns[-1])
    return torch.stack(returns[:0:-1], 1)


def trajectory_weight(discount: Tensor, start_weight: Tensor) -> Tensor:
    """How much each imagined step still counts: the start's weight times the discounts of the steps before it.

    Shapes: discount (N, H), start_weight (N,); result (N, H - 1), without gradient.
    """
    assert start_weight.shape == discount.shape[:1], start_weight.shape
    steps = torch.cat([start_weight[:, None], discount[:, :-2].detach()], 1)
    return steps.cumprod(1)


class ReturnScale(nn.Module):
    """The running range of the returns between their 5th and 95th percentile; starts at the first range it sees.

    Source: arXiv 2301.04104, eq. 11 and 12: large returns are scaled down, small ones are not blown up.
    """

    range: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.zeros(()))
        self.register_buffer(
            "weight", torch.zeros(())
        )  # of the ranges seen; takes the zero at the start out of the mean

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        """What to divide by, at least 1: (), after taking in these returns of any shape, unless one is not finite."""
        # one sort: torch.quantile has a largest size and, on the CPU, asks for a number
        ordered = returns.detach().flatten().sort().values
        last = ordered.numel() - 1
        spread = ordered[round(HIGH * last)] - ordered[round(LOW * last)]
        finite = torch.isfinite(ordered[0]) & torch.isfinite(ordered[-1])  # NaN sorts last
        self.range.copy_(torch.where(finite, torch.lerp(spread, self.range, RANGE_DECAY), self.range))
        self.weight.copy_(torch.where(finite, 1 - RANGE_DECAY * (1 - self.weight), self.weight))
        return (self.range / self.weight.clamp_min(1 - RANGE_DECAY)).clamp_min(1.0)
