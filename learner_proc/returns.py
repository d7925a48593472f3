"""Returns along imagined trajectories, and the running scale of these returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOW, HIGH = 0.05, 0.95  # a range of returns goes from the 5th to the 95th percentile
RANGE_DECAY = 0.99


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, *, lam: float) -> Tensor:
    """Return the critic's targets along imagined trajectories: a mixture of all n-step returns, weighted by lam.

    The value of a step includes the reward of that step. The discount of a step applies to everything after it. The
    last reward is not used, because the last value includes it. Example with H = 3, lam = 0.5, discount 0.9, reward
    [1, 2, 3] and value [10, 20, 30]: R_2 = 2 + 0.9 * 30 = 29; R_1 = 1 + 0.9 * (0.5 * 20 + 0.5 * 29) = 23.05.

    Shapes: reward, discount (gamma times continue) and value are (N, H), of the step arrived at; the result is
    (N, H - 1).
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
    """Return the weight of each imagined step: the weight of the start times the discounts of the steps before it.

    Shapes: discount (N, H), start_weight (N,); the result is (N, H - 1), without gradient.
    """
    assert start_weight.shape == discount.shape[:1], start_weight.shape
    steps = torch.cat([start_weight[:, None], discount[:, :-2].detach()], 1)
    return steps.cumprod(1)


class ReturnScale(nn.Module):
    """The running mean of the range between the 5th and the 95th percentile of the returns.

    Dividing by it makes large returns smaller. It is at least 1, so small returns, and their noise, are not amplified.
    Source: arXiv 2301.04104, eq. 11 and 12.
    """

    range: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.zeros(()))
        # The sum of the weights of all ranges so far. Dividing by it removes the zero of the start from the mean.
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        """Update the mean with these returns, unless one is not finite, and return what to divide by, at least 1.

        Shapes: returns of any shape; the result is ().
        """
        # Sort once instead of calling torch.quantile, which limits the size and, on the CPU, reads a number.
        ordered = returns.detach().flatten().sort().values
        last = ordered.numel() - 1
        spread = ordered[round(HIGH * last)] - ordered[round(LOW * last)]
        finite = torch.isfinite(ordered[0]) & torch.isfinite(ordered[-1])  # NaN is sorted to the end
        self.range.copy_(torch.where(finite, torch.lerp(spread, self.range, RANGE_DECAY), self.range))
        self.weight.copy_(torch.where(finite, 1 - RANGE_DECAY * (1 - self.weight), self.weight))
        return (self.range / self.weight.clamp_min(1 - RANGE_DECAY)).clamp_min(1.0)
