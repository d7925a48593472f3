"""The recurrent state-space model (RSSM): it predicts the next belief, and corrects it by an observation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.model.layers import ACTIVATIONS, GRU, Linear, dense, plain

if TYPE_CHECKING:
    from shared.config import NetworkSettings

MIN_STOCH_STD = 0.1


class Belief(NamedTuple):
    """What the agent keeps from step to step: deter (..., D) and stoch (..., S), float32."""

    deter: Tensor
    stoch: Tensor


class Posterior(NamedTuple):
    """A corrected belief, and the mean and std (..., S) of the distribution that its `stoch` was drawn from."""

    belief: Belief
    mean: Tensor
    std: Tensor


def feat(belief: Belief) -> Tensor:
    """Return the input of all heads: stoch and deter joined, (..., F)."""
    return torch.cat([belief.stoch, belief.deter], -1)


def split_stats(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std (..., S) of a stochastic state, in float32, from the output (..., 2S) of a layer."""
    return stats(*raw.chunk(2, -1))


def stats(mean: Tensor, raw_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std (..., S) of a stochastic state, in float32, from the two halves of a layer's output."""
    return mean.float(), F.softplus(raw_std.float()) + MIN_STOCH_STD


class RSSM(nn.Module):
    """The prior p(z | h), the posterior q(z | h, x), and the GRU that both share. Noise is always an argument.

    The first layer of the posterior has the input [h, embedding]. It is stored as two layers, `posterior_deter` and
    `posterior_embed`, so that the part of the embedding is computed for a whole window at once, before the recurrence.
    Source: arXiv 1912.01603 and its TensorFlow 2 code (softplus + 0.1, feat = [stoch, deter]).
    """

    def __init__(self, embed_dim: int, action_dim: int, networks: NetworkSettings) -> None:
        super().__init__()
        self.deter_dim, self.stoch_dim = networks.rssm_hidden_dim, networks.state_dim
        self.feat_dim = self.stoch_dim + self.deter_dim
        self.activation = ACTIVATIONS[networks.activation]()
        self.input = dense(self.stoch_dim + action_dim, self.deter_dim)
        self.gru = GRU(self.deter_dim, self.deter_dim)
        self.prior_hidden = dense(self.deter_dim, self.deter_dim)
        self.prior_out = dense(self.deter_dim, 2 * self.stoch_dim)
        joint = dense(self.deter_dim + embed_dim, self.deter_dim)  # for the Glorot bounds of the joint layer
        self.posterior_deter = nn.Linear(self.deter_dim, self.deter_dim, bias=False)
        self.posterior_embed = nn.Linear(embed_dim, self.deter_dim)
        with torch.no_grad():
            self.posterior_deter.weight.copy_(joint.weight[:, : self.deter_dim])
            self.posterior_embed.weight.copy_(joint.weight[:, self.deter_dim :])
            self.posterior_embed.bias.zero_()
        self.posterior_out = dense(self.deter_dim, 2 * self.stoch_dim)

    def initial(self, num: int) -> Belief:
        """Return a belief of zeros with `num` rows, on the device of the parameters."""
        weight = self.input.weight
        return Belief(
            torch.zeros(num, self.deter_dim, device=weight.device),
            torch.zeros(num, self.stoch_dim, device=weight.device),
        )

    def transition(self, belief: Belief, action: Tensor, linear: Linear = plain) -> Tensor:
        """Return the deterministic state after `action`, (N, D)."""
        x = self.activation(linear(self.input, torch.cat([belief.stoch, action], -1)))
        return self.gru(x, belief.deter, linear)

    def prior(self, deter: Tensor, linear: Linear = plain) -> tuple[Tensor, Tensor]:
        """Return mean and std of p(z | h). Shapes: (..., D) to two of (..., S)."""
        return split_stats(linear(self.prior_out, self.activation(linear(self.prior_hidden, deter))))

    def prior_step(self, belief: Belief, action: Tensor, noise: Tensor, *, linear: Linear = plain) -> Belief:
        """Return the belief after an imagined step. Shapes: action (N, A), noise (N, S)."""
        deter = self.transition(belief, action, linear)
        mean, std = self.prior(deter, linear)
        return Belief(deter, mean + std * noise)

    def embed_share(self, embed: Tensor) -> Tensor:
        """Return the embedding's part of the first posterior layer. Shapes: (..., embed_dim) to (..., D)."""
        return self.posterior_embed(embed)

    def posterior(self, deter: Tensor, embed_share: Tensor, linear: Linear = plain) -> tuple[Tensor, Tensor]:
        """Return mean and std of q(z | h, x). Shapes: deter and embed_share (..., D) to two of (..., S)."""
        hidden = self.activation(linear(self.posterior_deter, deter) + embed_share)
        return split_stats(linear(self.posterior_out, hidden))

    def posterior_step(
        self,
        belief: Belief,
        action: Tensor,
        embed_share: Tensor,
        is_first: Tensor,
        noise: Tensor,
        *,
        linear: Linear = plain,
    ) -> Posterior:
        """Return the belief after an observed step, and the posterior it was drawn from.

        Where `is_first`, belief and action are set to zero first. The transition comes after that, so the first belief
        of an episode is one GRU step away from zero.
        Shapes: action (N, A), embed_share (N, D), is_first (N, 1) bool, noise (N, S).
        """
        # Select, do not multiply by zero: 0 * NaN is NaN.
        blank = Belief(belief.deter.masked_fill(is_first, 0.0), belief.stoch.masked_fill(is_first, 0.0))
        deter = self.transition(blank, action.masked_fill(is_first, 0.0), linear)
        mean, std = self.posterior(deter, embed_share, linear)
        return Posterior(Belief(deter, mean + std * noise), mean, std)
