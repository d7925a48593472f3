"""Behaviour: the losses of the actor, which maximises imagined returns, and of the critic, which predicts them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from learner_proc.heads import ScalarHead
from learner_proc.imagination import frozen_view
from learner_proc.returns import ReturnScale, lambda_return, trajectory_weight
from shared.model.distributions import unit_gaussian_nll

if TYPE_CHECKING:
    from shared.config import OptimizationSettings


REINFORCE_SHARE = 0.9  # with optimization.actor_gradient=mix, as in arXiv 2010.02193 for tasks with few actions


class ActorLoss(NamedTuple):
    """The actor's loss and what the critic learns from; only `total` carries a gradient.

    target, weight (N, H - 1): the returns and how much each counts. return_scale (): what the actor's returns, but not
    `target`, were divided by. reward_mean, value_mean (): means over all imagined steps.
    """

    total: Tensor
    target: Tensor
    weight: Tensor
    reward_mean: Tensor
    value_mean: Tensor
    return_scale: Tensor


class CriticLoss(NamedTuple):
    """`total` carries the gradient. `bias` is the weighted mean of value minus target, detached."""

    total: Tensor
    bias: Tensor


class Behavior(nn.Module):
    """Both behaviour losses, as functions of the outputs of the reward, continue and value heads.

    Rewards, values and discounts are means, never samples. With `slow_critic_decay`, returns are made of the values of
    a slow copy of the critic. That copy and the running scale of the returns are state, like the critic itself.
    """

    def __init__(
        self, reward: ScalarHead, cont: ScalarHead | None, critic: ScalarHead, optimization: OptimizationSettings
    ) -> None:
        super().__init__()
        self.critic = critic
        self.slow_decay = optimization.slow_critic_decay
        self.slow_critic = None if self.slow_decay is None else copy.deepcopy(critic).requires_grad_(False)
        self.frozen_reward = frozen_view(reward)
        self.frozen_value = frozen_view(critic) if self.slow_critic is None else self.slow_critic
        self.frozen_cont = None if cont is None else frozen_view(cont)
        self.gamma, self.lam = optimization.gamma, optimization.lmbda
        self.entropy_scale, self.actor_gradient = optimization.entropy_scale, optimization.actor_gradient
        normed, device = optimization.return_norm == "percentile", next(critic.parameters()).device
        self.return_scale = ReturnScale().to(device) if normed else None

    def heads(self) -> dict[str, ScalarHead]:
        """Return the heads whose outputs `actor_loss` takes, by the name of its argument. None requires a gradient."""
        heads = {"reward": self.frozen_reward, "value": self.frozen_value}
        return heads if self.frozen_cont is None else heads | {"cont": self.frozen_cont}

    def actor_loss(
        self,
        reward: Tensor,
        value: Tensor,
        start_terminal: Tensor,
        entropy: Tensor,
        cont: Tensor | None = None,
        log_prob: Tensor | None = None,
        start_value: Tensor | None = None,
    ) -> ActorLoss:
        """Return minus the weighted mean return, from the outputs of `heads` for the imagined features.

        With a continue head, an imagination that starts where the task ended has weight 0. The entropy of an action has
        the same weight as the step that the action leads to.
        With `log_prob`, the actor learns from the score function (REINFORCE): an action becomes more likely if its
        return exceeds the value of the belief in which it was chosen. `start_value` is the value of the starts.
        Shapes: reward, value and cont (the continue head's logit) are (N, H), entropy (N, H), start_terminal (N,) bool;
        log_prob (N, H), start_value (N,), or None with actor_gradient=dynamics.
        Units: entropy in nats.
        Source: arXiv 1912.01603, eq. 7.
        """
        assert reward.dim() == 2 and reward.shape == value.shape == entropy.shape, (reward.shape, value.shape)
        assert start_terminal.shape == reward.shape[:1], (start_terminal.shape, reward.shape)
        if cont is None:
            discount, start_weight = torch.full_like(reward, self.gamma), torch.ones_like(reward[:, 0])
        else:
            discount = torch.sigmoid(cont)  # the head's target is gamma, so the discount is already in it
            start_weight = (~start_terminal).float()
        target = lambda_return(reward, discount, value, lam=self.lam)  # (N, H - 1)
        weight = trajectory_weight(discount, start_weight)
        scale = torch.ones_like(reward[0, 0]) if self.return_scale is None else self.return_scale(target)
        objective = target if self.return_scale is None else target / scale
        if log_prob is not None and start_value is not None:
            objective = self._with_score(objective, log_prob, target, value, start_value, scale)
        if self.entropy_scale > 0:
            objective = objective + self.entropy_scale * entropy[:, :-1]
        total = -(weight * objective).mean()
        return ActorLoss(total, target.detach(), weight, reward.detach().mean(), value.detach().mean(), scale)

    def _with_score(
        self, objective: Tensor, log_prob: Tensor, target: Tensor, value: Tensor, start_value: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the objective (N, H - 1) of REINFORCE, or its mix with the one that flows through the dynamics."""
        baseline = torch.cat([start_value[:, None], value[:, :-2]], 1)  # of the belief before each action
        score = log_prob[:, :-1] * ((target - baseline) / scale).detach()
        return score if self.actor_gradient == "reinforce" else torch.lerp(objective, score, REINFORCE_SHARE)

    def critic_loss(self, value: Tensor, target: Tensor, weight: Tensor) -> CriticLoss:
        """Return the weighted negative log-likelihood of the returns under N(value, 1).

        Shapes: value, target and weight are (N, H - 1): the critic's values without the last imagined step, and the
        target and weight of `actor_loss`, both constants.
        Units: nats.
        Source: arXiv 1912.01603, eq. 8.
        """
        assert value.shape == target.shape == weight.shape, (value.shape, target.shape, weight.shape)
        total = (weight * unit_gaussian_nll(target, value, event_dims=0)).mean()
        bias = (weight * (value.detach() - target)).sum() / weight.sum().clamp_min(1e-6)
        return CriticLoss(total, bias)

    @torch.no_grad()
    def update_slow_critic(self, skipped: Tensor) -> None:
        """Move the slow critic one step towards the critic, in place, unless the critic's step was skipped.

        Shapes: skipped () bool.
        """
        if self.slow_critic is None or self.slow_decay is None:
            return
        share = torch.where(skipped, 0.0, 1.0 - self.slow_decay)
        for slow, now in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(now, share)

    def state(self) -> dict[str, nn.Module]:
        """Return the parts that have state of their own beside the heads, by name. The original algorithm has none."""
        modules = {"slow_critic": self.slow_critic, "return_scale": self.return_scale}
        return {name: module for name, module in modules.items() if module is not None}
