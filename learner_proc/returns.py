"""Returns along imagined trajectories."""

from __future__ import annotations

import torch
from torch import Tensor


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
        raise ValueError(f"lambda_return: lam={lam} is no mixing weight, wanted 0..1; mend optimization.lmbda")
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
