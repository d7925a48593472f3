"""How often the actor's actions are at a limit, in each dimension.

The derivative of tanh is almost 0 there, so an actor that is always at a limit gets almost no gradient. On a robot it
usually means that the range of the actions is too small, or that the first actions were too wide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner_proc.numbers import Numbers
from shared.metrics import SATURATED

if TYPE_CHECKING:
    from shared.model.policy import Actor

LIMIT = 0.97  # an action beyond it, in either direction, is at a limit


class SaturationCheck:
    """The share of the actor's samples at a limit, at features of replayed states, for rows of metrics.jsonl."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self.metrics = tuple(SATURATED.member(index) for index in range(actor.action_dim))

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Numbers:
        """Return the share in each dimension. Draws nothing and does not synchronise.

        Shapes: features (..., F).
        """
        mean, std = self._actor(features)
        return Numbers(self.metrics, saturated_share(mean, std).flatten(0, -2).mean(0))


def saturated_share(mean: Tensor, std: Tensor) -> Tensor:
    """Return the probability that tanh of a sample of N(mean, std) is beyond LIMIT. All shapes are equal."""
    bound = math.atanh(LIMIT)
    return torch.special.ndtr((mean - bound) / std) + torch.special.ndtr((-bound - mean) / std)
