"""The recurrent state-space model: how a belief moves on, and how an observation corrects it."""

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
    """What the agent carries between steps: deter (..., D) and stoch (..., S), float32."""

    deter: Tensor
    stoch: Tensor


class Posterior(NamedTuple):
    """A corrected belief and the mean and std (..., S) its stochastic part was drawn from."""

    belief: Belief
    mean: Tensor
    std: Tensor


def feat(belief: Belief) -> Tensor:
    """What every head reads: [stoch, deter], (..., F)."""
    return torch.cat([belief.stoch, belief.deter], -1)


def split_stats(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of a stochastic state from a layer's output (..., 2S); float32."""
    mean, raw_std = raw.float().chunk(2, -1)
    return mean, F.softplus(raw_std) + MIN_STOCH_STD


class RSSM(nn.Module):
    """Prior p(z | h) and posterior q(z | h, x) around one GRU; noise always enters as an argument.

    The first posterior layer reads [h, embedding]. It is kept as two blocks, `posterior_deter` and `posterior_embed`,
    so that the embedding's share is computed for a whole window at once, outside the recurrence.
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
        joint = dense(self.deter_dim + embed_dim, self.deter_dim)  # Glorot over the joint fan-in
        self.posterior_deter = nn.Linear(self.deter_dim, self.deter_dim, bias=False)
        self.posterior_embed = nn.Linear(embed_dim, self.deter_dim)
        with torch.no_grad():
            self.posterior_deter.weight.copy_(joint.weight[:, : self.deter_dim])
            self.posterior_embed.weight.copy_(joint.weight[:, self.deter_dim :])
            self.posterior_embed.bias.zero_()
        self.posterior_out = dense(self.deter_dim, 2 * self.stoch_dim)

    def initial(self, num: int) -> Belief:
        """The blank belief of `num` rows, on the parameters' device."""
        weight = self.input.weight
        return Belief(
            torch.zeros(num, self.deter_dim, device=weight.device),
            torch.zeros(num, self.stoch_dim, device=weight.device),
        )

    def transition(self, belief: Belief, action: Tensor, linear: Linear = plain) -> Tensor:
        """The deterministic state after `action`: (N, D)."""
        x = self.activation(linear(self.input, torch.cat([belief.stoch, action], -1)))
        return self.gru(x, belief.deter, linear)

    def prior(self, deter: Tensor, linear: Linear = plain) -> tuple[Tensor, Tensor]:
        """Mean and std of p(z | h): (..., D) to two of (..., S)."""
        return split_stats(linear(self.prior_out, self.activation(linear(self.prior_hidden, deter))))

    def prior_step(self, belief: Belief, action: Tensor, noise: Tensor, *, linear: Linear = plain) -> Belief:
        """One imagined step. Shapes: action (N, A), noise (N, S)."""
        deter = self.transition(belief, action, linear)
        mean, std = self.prior(deter, linear)
        return Belief(deter, mean + std * noise)

    def embed_share(self, embed: Tensor) -> Tensor:
        """The embedding's share of the first posterior layer: (..., embed_dim) to (..., D)."""
        return self.posterior_embed(embed)

    def posterior(self, deter: Tensor, embed_share: Tensor, linear: Linear = plain) -> tuple[Tensor, Tensor]:
        """Mean and std of q(z | h, x), with the embedding's share of the first layer: (..., D) to two of (..., S)."""
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
        """One observed step: blank the belief and action where `is_first`, move on, correct by the observation.

        The reset comes before the transition, so the first belief of an episode is a GRU step away from zero.
        Shapes: action (N, A), embed_share (N, D), is_first (N, 1) bool, noise (N, S).
        """
        # selection, never multiplication: 0 * NaN is NaN
        blank = Belief(belief.deter.masked_fill(is_first, 0.0), belief.stoch.masked_fill(is_first, 0.0))
        deter = self.transition(blank, action.masked_fill(is_first, 0.0), linear)
        mean, std = self.posterior(deter, embed_share, linear)
        return Posterior(Belief(deter, mean + std * noise), mean, std)
