"""The policy: normaliser, encoder, RSSM and actor in one module. The learner publishes its weights to the collector."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.model.distributions import tanh_normal_mode
from shared.model.encoder import Encoder
from shared.model.layers import Linear, Normaliser, mlp, plain
from shared.model.rssm import RSSM, Belief, feat

if TYPE_CHECKING:
    from shared.config import NetworkSettings
    from shared.stream import StreamSpec

ACTOR_LAYERS = 4
MEAN_SCALE = 5.0
MIN_ACTION_STD = 1e-4  # before the tanh, in the code of arXiv 1912.01603


class Actor(nn.Module):
    """The actor: a normal distribution over actions, squashed by a tanh.

    Source: the `tanh_normal` head in the code of arXiv 1912.01603.
    """

    def __init__(self, feat_dim: int, action_dim: int, networks: NetworkSettings) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.layers = mlp(feat_dim, networks.hidden_dim, ACTOR_LAYERS, networks.activation, 2 * action_dim)
        self.min_std = networks.actor_min_std
        # The inverse of softplus at init_std, in a form that does not overflow. A higher floor does not change the sum.
        above_floor = networks.init_std - (self.min_std - MIN_ACTION_STD)
        self.raw_init_std = above_floor + math.log(-math.expm1(-above_floor))

    def forward(self, feat: Tensor, linear: Linear = plain) -> tuple[Tensor, Tensor]:
        """Return mean and std before the tanh, in float32. Shapes: (..., F) to two of (..., A)."""
        x = feat
        for layer in self.layers:
            x = linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return self.stats(*x.chunk(2, -1))

    def stats(self, mean: Tensor, raw_std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std before the tanh, in float32, from the two halves (..., A) of the last layer's output."""
        mean, raw_std = mean.float(), raw_std.float()
        return MEAN_SCALE * torch.tanh(mean / MEAN_SCALE), F.softplus(raw_std + self.raw_init_std) + self.min_std


class Policy(nn.Module):
    """The part of the agent that acts. Both processes have it, with the same parameters and buffers."""

    def __init__(self, spec: StreamSpec, networks: NetworkSettings) -> None:
        """Create the networks. Raises: ValueError if an observation entry is neither a 64x64 image nor a vector."""
        super().__init__()
        self.normaliser = Normaliser(spec, enabled=networks.normalize_obs, symlogged=networks.symlog_obs)
        self.encoder = Encoder(spec, networks)
        self.rssm = RSSM(self.encoder.embed_dim, spec.action_dim, networks)
        self.actor = Actor(self.rssm.feat_dim, spec.action_dim, networks)

    def initial_belief(self, num_envs: int) -> Belief:
        """Return beliefs of zeros (E, ...), on the device of the parameters."""
        return self.rssm.initial(num_envs)

    @torch.no_grad()
    def explore(
        self,
        obs: dict[str, Tensor],
        belief: Belief,
        prev_action: Tensor,
        reset: Tensor,
        *,
        noise_std: float,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Belief]:
        """Return the actions to execute, (E, A) float32 in [-1, 1], and the beliefs in which they were chosen.

        An action is a sample plus N(0, noise_std), clipped. Where `reset` is true, belief and previous action are set
        to zero before the step. Pass the returned action as `prev_action` in the next call, because it is the one that
        is executed. generator: of all random numbers; None takes torch's global one.
        Shapes: obs entries (E, *shape), not normalised; prev_action (E, A); reset (E,) bool.
        """
        mean, std, belief = self._observe(obs, belief, prev_action, reset, generator)
        sample = torch.tanh(mean + std * normal_like(mean, generator))
        return (sample + noise_std * normal_like(mean, generator)).clamp(-1.0, 1.0), belief

    @torch.no_grad()
    def evaluate(
        self,
        obs: dict[str, Tensor],
        belief: Belief,
        prev_action: Tensor,
        reset: Tensor,
        *,
        eval_action: str,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Belief]:
        """Return actions without noise, and the beliefs in which they were chosen.

        An action is the most likely of 100 samples if `eval_action` is "mode", tanh of the mean if it is "mean".
        Shapes: as for `explore`.
        """
        mean, std, belief = self._observe(obs, belief, prev_action, reset, generator)
        if eval_action == "mode":
            return tanh_normal_mode(mean, std, generator=generator), belief
        return torch.tanh(mean), belief

    def _observe(
        self,
        obs: dict[str, Tensor],
        belief: Belief,
        prev_action: Tensor,
        reset: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Belief]:
        """Return the mean and std of the actions before the tanh, and the beliefs."""
        num_envs = reset.shape[0]
        assert prev_action.shape[0] == belief.deter.shape[0] == num_envs, (prev_action.shape, belief.deter.shape)
        embed_share = self.rssm.embed_share(self.encoder(self.normaliser(obs)))
        noise = normal_like(belief.stoch, generator)
        belief = self.rssm.posterior_step(belief, prev_action, embed_share, reset[:, None], noise).belief
        return *self.actor(feat(belief)), belief


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return N(0, 1) numbers of the shape of a tensor. `torch.randn_like` takes no generator in older versions."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
