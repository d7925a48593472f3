"""The losses of actor and critic with their gradients, each head evaluated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner_proc.slopes import Evaluation, HeadEvaluator
from shared.model.rssm import feat

if TYPE_CHECKING:
    from learner_proc.behavior import ActorLoss, Behavior, CriticLoss
    from learner_proc.heads import ScalarHead
    from learner_proc.imagination import Imagined
    from learner_proc.optimiser import Optimiser
    from shared.model.rssm import Belief


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

    def __call__(self, imagined: Imagined, start_terminal: Tensor, start: Belief) -> BehaviorStep:
        """Shapes: start_terminal (N,) bool; start (N, ...)."""
        features = imagined.feat.detach().flatten(0, 1)  # (N * H, F)
        heads, shared = self._behavior.heads(), self._behavior.slow_critic is None
        # Without a slow critic, the evaluation of the critic for the actor's loss also serves the critic's own loss.
        evaluations = {
            name: self.heads.evaluate(head.layers, features, for_weights=shared and name == "value")
            for name, head in heads.items()
        }
        score = self._score(imagined, start, heads["value"])
        actor, actor_grads = self._learn_actor(imagined, start_terminal, evaluations, score)
        own = evaluations["value"]
        if not shared:
            own = self.heads.evaluate(self._behavior.critic.layers, features, for_weights=True)
        critic, critic_grads = self._learn_critic(own, actor, imagined.feat.shape[:2])
        return BehaviorStep(actor, critic, actor_grads, critic_grads)

    def _score(self, imagined: Imagined, start: Belief, value: ScalarHead) -> dict[str, Tensor]:
        """Return what the loss needs for the score function: nothing if the actor learns through the dynamics alone."""
        if imagined.log_prob is None:
            return {}
        start_value = self.heads.evaluate(value.layers, feat(start), for_weights=False).value
        return {"log_prob": imagined.log_prob, "start_value": start_value}

    def _learn_actor(
        self,
        imagined: Imagined,
        start_terminal: Tensor,
        evaluations: dict[str, Evaluation],
        score: dict[str, Tensor],
    ) -> tuple[ActorLoss, list[Tensor]]:
        """Differentiate the loss to the heads' outputs, from there to the features, and from there to the actor.

        With the score function, also to the log-densities of the actions, or to these alone.
        """
        lead = imagined.feat.shape[:2]
        outputs = {name: one.value.view(lead).requires_grad_() for name, one in evaluations.items()}
        actor = self._actor_loss(**outputs, start_terminal=start_terminal, entropy=imagined.entropy, **score)
        direct = [imagined.entropy] if self._behavior.entropy_scale > 0 else []
        direct += [score["log_prob"]] if score else []
        through = list(outputs.values()) if self._behavior.actor_gradient != "reinforce" else []
        grads = torch.autograd.grad(self._actor.scaled(actor.total), [*through, *direct])
        output_grads, direct_grads = grads[: len(through)], grads[len(through) :]
        ends, end_grads = direct, list(direct_grads)
        if through:
            feat_grad = self.heads.feat_gradient(
                list(evaluations.values()), [grad.reshape(-1) for grad in output_grads]
            )
            ends, end_grads = [imagined.feat, *direct], [feat_grad.view_as(imagined.feat), *direct_grads]
        return actor, list(torch.autograd.grad(ends, self._actor.params, end_grads))

    def _learn_critic(self, own: Evaluation, actor: ActorLoss, lead: torch.Size) -> tuple[CriticLoss, list[Tensor]]:
        """Shapes: lead is (N, H)."""
        value = own.value.view(lead)[:, :-1].detach().requires_grad_()
        critic = self._critic_loss(value, actor.target, actor.weight)
        (value_grad,) = torch.autograd.grad(self._critic.scaled(critic.total), value)
        padded = F.pad(value_grad, (0, 1)).flatten()  # the last step has no target, so its gradient is 0
        return critic, self.heads.weight_gradients(own, padded)
