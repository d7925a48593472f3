"""The losses of actor and critic with their gradients, each head evaluated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner_proc.slopes import Evaluation, HeadEvaluator

if TYPE_CHECKING:
    from learner_proc.behavior import ActorLoss, Behavior, CriticLoss
    from learner_proc.imagination import Imagined
    from learner_proc.optimiser import Optimiser


class BehaviorStep(NamedTuple):
    """Both losses, and the gradients of the scaled losses in the order of the optimisers' parameters."""

    actor: ActorLoss
    critic: CriticLoss
    actor_grads: list[Tensor]
    critic_grads: list[Tensor]


class BehaviorGradients:
    """Computes what autograd would: see `learner_proc.slopes` for how, and `docs/faster.md` for why."""

    def __init__(
        self,
        behavior: Behavior,
        optimisers: dict[str, Optimiser],
        *,
        dtype: torch.dtype,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """optimisers: those of "actor" and "value"; dtype: of the heads' matrix products."""
        self._behavior = behavior
        self._actor, self._critic = optimisers["actor"], optimisers["value"]
        self._actor_loss, self._critic_loss = compiled(behavior.actor_loss), compiled(behavior.critic_loss)
        self.heads = HeadEvaluator(dtype, compiled=compiled)

    def __call__(self, imagined: Imagined, start_terminal: Tensor) -> BehaviorStep:
        """Shapes: start_terminal (N,) bool."""
        feat = imagined.feat.detach().flatten(0, 1)  # (N * H, F)
        heads, shared = self._behavior.heads(), self._behavior.slow_critic is None
        # Without a slow critic, the evaluation of the critic for the actor's loss also serves the critic's own loss.
        evaluations = {
            name: self.heads.evaluate(head.layers, feat, for_weights=shared and name == "value")
            for name, head in heads.items()
        }
        actor, actor_grads = self._learn_actor(imagined, start_terminal, evaluations)
        own = evaluations["value"]
        if not shared:
            own = self.heads.evaluate(self._behavior.critic.layers, feat, for_weights=True)
        critic, critic_grads = self._learn_critic(own, actor, imagined.feat.shape[:2])
        return BehaviorStep(actor, critic, actor_grads, critic_grads)

    def _learn_actor(
        self, imagined: Imagined, start_terminal: Tensor, evaluations: dict[str, Evaluation]
    ) -> tuple[ActorLoss, list[Tensor]]:
        """Differentiate the loss to the heads' outputs, from there to the features, and from there to the actor."""
        lead = imagined.feat.shape[:2]
        outputs = {name: one.value.view(lead).requires_grad_() for name, one in evaluations.items()}
        actor = self._actor_loss(**outputs, start_terminal=start_terminal, entropy=imagined.entropy)
        bonus = [imagined.entropy] if imagined.entropy.requires_grad else []
        grads = torch.autograd.grad(self._actor.scaled(actor.total), [*outputs.values(), *bonus])
        output_grads, entropy_grad = grads[: len(outputs)], grads[len(outputs) :]
        feat_grad = self.heads.feat_gradient(list(evaluations.values()), [grad.reshape(-1) for grad in output_grads])
        actor_grads = torch.autograd.grad(
            [imagined.feat, *bonus], self._actor.params, [feat_grad.view_as(imagined.feat), *entropy_grad]
        )
        return actor, list(actor_grads)

    def _learn_critic(self, own: Evaluation, actor: ActorLoss, lead: torch.Size) -> tuple[CriticLoss, list[Tensor]]:
        """Shapes: lead is (N, H)."""
        value = own.value.view(lead)[:, :-1].detach().requires_grad_()
        critic = self._critic_loss(value, actor.target, actor.weight)
        (value_grad,) = torch.autograd.grad(self._critic.scaled(critic.total), value)
        padded = F.pad(value_grad, (0, 1)).flatten()  # the last step has no target, so its gradient is 0
        return critic, self.heads.weight_gradients(own, padded)
