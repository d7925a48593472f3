"""Imagination: the prior rolled on under the actor, from every replayed belief."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from learner_proc.scan import unroll
from shared.model.distributions import tanh_normal_entropy
from shared.model.layers import Linear, plain
from shared.model.policy import Actor
from shared.model.rssm import RSSM, Belief, feat

Module = TypeVar("Module", bound=nn.Module)


class Imagined(NamedTuple):
    """Features of the imagined steps (N, H, F), the start not among them.

    `entropy` (N, H) estimates, in nats, the actor's entropy in the belief each step was reached from; `actor_std` is the
    mean over everything, a detached scalar.
    """

    feat: Tensor
    entropy: Tensor
    actor_std: Tensor


class ImaginedStep(NamedTuple):
    """The belief arrived at, and the mean and std (N, A), before the tanh, of the action that led there."""

    belief: Belief
    action_mean: Tensor
    action_std: Tensor


def frozen_twin(module: Module) -> Module:
    """A copy that shares the original's storage and takes no gradient of its own.

    Updates in place of the original show in the twin; gradients flow through it to what came before. Make it after the
    original reached its device.
    """
    twin = copy.deepcopy(module)
    for mine, original in zip(twin.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(False)
        mine.data = original.data
    return twin


def random_subset(num: int, count: int, device: torch.device) -> Tensor:
    """`count` distinct numbers below `num`, every set alike likely, drawn on the device without a wait: (count,) int64."""
    assert 1 <= count <= num, (count, num)
    return torch.rand(num, device=device).topk(count, sorted=False).indices


class Dreamer(nn.Module):
    """The actor acting in the frozen RSSM."""

    def __init__(self, rssm: RSSM, actor: Actor, *, entropy_gradient: bool = False) -> None:
        """`rssm` is a frozen twin, `actor` the original; without `entropy_gradient` the entropy is a mere number."""
        super().__init__()
        self.rssm, self.actor, self.entropy_gradient = rssm, actor, entropy_gradient

    def step(self, belief: Belief, action_noise: Tensor, noise: Tensor, *, linear: Linear = plain) -> ImaginedStep:
        """One sampled action and the belief after it. Shapes: action_noise (N, A), noise (N, S).

        The policy's input is detached: the actor learns through its actions and the states they lead to.
        """
        mean, std = self.actor(feat(belief).detach(), linear)
        action = torch.tanh(mean + std * action_noise)
        stats = (mean, std) if self.entropy_gradient else (mean.detach(), std.detach())
        return ImaginedStep(self.rssm.prior_step(belief, action, noise, linear=linear), *stats)

    def imagine(
        self,
        start: Belief,
        action_noise: Tensor,
        noise: Tensor,
        *,
        scan: Callable[[Belief, Sequence[Tensor]], ImaginedStep] | None = None,
    ) -> Imagined:
        """Roll H steps from detached starts; `scan` unrolls this module's step, by default plainly.

        Shapes: start (N, ...), action_noise (H, N, A), noise (H, N, S).
        """
        num_starts = start.deter.shape[0]
        assert action_noise.shape[:2] == noise.shape[:2] == (noise.shape[0], num_starts), action_noise.shape
        scan = scan or partial(unroll, self.step)
        imagined = scan(Belief(*(part.detach() for part in start)), (action_noise, noise))
        mean, std = imagined.action_mean, imagined.action_std
        entropy = tanh_normal_entropy(mean, std, action_noise.transpose(0, 1))  # (N, H)
        return Imagined(feat(imagined.belief), entropy, std.detach().mean())
