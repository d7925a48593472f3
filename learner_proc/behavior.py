"""Behaviour: the actor climbs the imagined returns, the critic learns to predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from learner_proc.heads import ScalarHead
from learner_proc.imagination import frozen_twin
from learner_proc.returns import lambda_return, trajectory_weight
from shared.model.distributions import unit_gaussian_nll

if TYPE_CHECKING:
    from shared.config import OptimizationSettings


class ActorLoss(NamedTuple):
    """`total` carries the gradient; `target` and `weight` (N, H - 1) are the critic's; the means are metrics."""

    total: Tensor
    target: Tensor
    weight: Tensor
    reward_mean: Tensor
    value_mean: Tensor


class Behavior(nn.Module):
    """Both behaviour losses, read off frozen twins of the reward, continue and value heads.

    Rewards, values and continuation are means, never samples.
    """

    def __init__(
        self, reward: ScalarHead, cont: ScalarHead | None, critic: ScalarHead, optimization: OptimizationSettings
    ) -> None:
        super().__init__()
        self.critic = critic
        self.frozen_reward, self.frozen_value = frozen_twin(reward), frozen_twin(critic)
        self.frozen_cont = None if cont is None else frozen_twin(cont)
        self.gamma, self.lam = optimization.gamma, optimization.lmbda

    def actor_loss(self, feat: Tensor, start_terminal: Tensor) -> ActorLoss:
        """Minus the weighted mean return; its gradient reaches the actor through the imagined features.

        With a continue head an imagination that starts at the end of a task counts nothing.
        Shapes: feat (N, H, F), start_terminal (N,) bool. Source: arXiv 1912.01603, eq. 7.
        """
        assert feat.dim() == 3 and start_terminal.shape == feat.shape[:1], (feat.shape, start_terminal.shape)
        reward, value = self.frozen_reward(feat), self.frozen_value(feat)  # (N, H)
        if self.frozen_cont is None:
            discount, start_weight = torch.full_like(reward, self.gamma), torch.ones_like(reward[:, 0])
        else:
            discount = torch.sigmoid(self.frozen_cont(feat))  # its target is gamma, so gamma is already in it
            start_weight = (~start_terminal).float()
        target = lambda_return(reward, discount, value, lam=self.lam)  # (N, H - 1)
        weight = trajectory_weight(discount, start_weight)
        total = -(weight * target).mean()
        return ActorLoss(total, target.detach(), weight, reward.detach().mean(), value.detach().mean())

    def critic_loss(self, feat: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The weighted negative log-likelihood of the returns under N(value, 1), in nats.

        Shapes: feat (N, H, F), target and weight (N, H - 1), all taken as constants. Source: arXiv 1912.01603, eq. 8.
        """
        assert target.shape == weight.shape == (feat.shape[0], feat.shape[1] - 1), (feat.shape, target.shape)
        value = self.critic(feat[:, :-1].detach())
        return (weight * unit_gaussian_nll(target, value, event_dims=0)).mean()
