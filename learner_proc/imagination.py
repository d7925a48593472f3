"""Imagination: from replayed beliefs, the actor acts in the RSSM and the prior predicts what follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from shared.model.distributions import normal_log_prob, tanh_normal_entropy
from shared.model.layers import Linear, plain
from shared.model.policy import Actor
from shared.model.rssm import RSSM, Belief, feat

Module = TypeVar("Module", bound=nn.Module)


class Imagined(NamedTuple):
    """The imagined steps, without the start.

    feat (N, H, F): the features; entropy (N, H): a one-sample estimate, in nats, of the entropy of the action that led
    to each step; actor_std (): the mean standard deviation of all actions before the tanh, detached; log_prob (N, H):
    the log-density of that action before the tanh, in which the action is a constant; None if nothing learns from it.
    """

    feat: Tensor
    entropy: Tensor
    actor_std: Tensor
    log_prob: Tensor | None = None


class ImaginedStep(NamedTuple):
    """The belief after an action, and the mean and std (N, A) of that action before the tanh."""

    belief: Belief
    action_mean: Tensor
    action_std: Tensor


def frozen_view(module: Module) -> Module:
    """Return a module with the same parameter memory, whose parameters require no gradient.

    In-place updates of the original show in the view. Gradients flow through it to what came before it. Make it after
    the original has reached its device.
    """
    view = copy.deepcopy(module)
    for own, original in zip(view.parameters(), module.parameters(), strict=True):
        own.requires_grad_(False)
        own.data = original.data
    return view


def random_subset(num: int, count: int, device: torch.device) -> Tensor:
    """Return `count` different numbers below `num`, (count,) int64, each set with the same probability.

    They are drawn on the device without a synchronisation.
    """
    assert 1 <= count <= num, (count, num)
    return torch.rand(num, device=device).topk(count, sorted=False).indices


class Imagination(nn.Module):
    """The actor acting in a frozen RSSM."""

    def __init__(self, rssm: RSSM, actor: Actor, *, entropy_gradient: bool = False, log_prob: bool = False) -> None:
        """rssm: a `frozen_view`. actor: the one that learns.

        entropy_gradient: whether the entropy has a gradient. log_prob: whether `Imagined.log_prob` is computed.
        """
        super().__init__()
        self.rssm, self.actor, self.log_prob = rssm, actor, log_prob
        self.entropy_gradient = entropy_gradient or log_prob

    def step(self, belief: Belief, action_noise: Tensor, noise: Tensor, *, linear: Linear = plain) -> ImaginedStep:
        """Sample one action and predict the belief after it. Shapes: action_noise (N, A), noise (N, S).

        The actor's input is detached: it learns through its actions and the states they lead to.
        """
        mean, std = self.actor(feat(belief).detach(), linear)
        action = torch.tanh(mean + std * action_noise)
        return ImaginedStep(self.rssm.prior_step(belief, action, noise, linear=linear), *self.kept(mean, std))

    def kept(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return an action's mean and std, with their gradient if the entropy has one."""
        return (mean, std) if self.entropy_gradient else (mean.detach(), std.detach())

    def imagine(
        self,
        start: Belief,
        action_noise: Tensor,
        noise: Tensor,
        *,
        scan: Callable[[Belief, Sequence[Tensor]], ImaginedStep],
        summarise: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Imagined:
        """Imagine H steps from detached starts. `scan` unrolls `step` along time.

        summarise: by default `entropy_and_std`. A gradient step passes a faster form.

        Shapes: start (N, ...), action_noise (H, N, A), noise (H, N, S).
        """
        num_starts = start.deter.shape[0]
        assert action_noise.shape[:2] == noise.shape[:2] == (noise.shape[0], num_starts), action_noise.shape
        imagined = scan(Belief(*(part.detach() for part in start)), (action_noise, noise))
        entropy, std = (summarise or entropy_and_std)(*imagined[1:], action_noise.transpose(0, 1))
        log_prob = action_log_prob(*imagined[1:], action_noise.transpose(0, 1)) if self.log_prob else None
        return Imagined(feat(imagined.belief), entropy, std, log_prob)


def action_log_prob(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Return the log-density before the tanh of the actions that were taken, (...). Shapes: (..., A) each."""
    return normal_log_prob((mean + std * noise).detach(), mean, std)


def entropy_and_std(mean: Tensor, std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropy of every action (...), and the mean of all `std`, detached. Shapes: (..., A) each."""
    return tanh_normal_entropy(mean, std, noise), std.detach().mean()
