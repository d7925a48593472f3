"""The world model: it turns replayed windows into posterior beliefs, and learns to predict their content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from learner_proc.heads import CONT_LAYERS, REWARD_LAYERS, Decoder, ScalarHead
from learner_proc.scan import unroll
from shared.model.distributions import bernoulli_nll, gaussian_kl, unit_gaussian_nll
from shared.model.rssm import Belief, Posterior, feat

if TYPE_CHECKING:
    from shared.config import Settings
    from shared.model.policy import Policy
    from shared.stream import StreamSpec

IMAGE_FREE_NATS = 3.0
VECTOR_FREE_NATS = 1.0  # the KL of a small vector may stay below 3 nats, and then nothing would train the prior


class ModelLoss(NamedTuple):
    """`total` carries the gradient. The parts are detached batch means in nats; `kl` and `kl_free` are as in `KL`."""

    total: Tensor
    obs: Tensor
    reward: Tensor
    cont: Tensor
    kl: Tensor
    kl_free: Tensor


class KL(NamedTuple):
    """The KL between posterior and prior.

    mean: the batch mean in nats, before the free nats; loss: the mean with the free nats as lower limit; free: the
    share of the KL that has no gradient because it is below the free nats. With a limit for each step this is the share
    of such steps; otherwise it is 0 or 1.
    """

    mean: Tensor
    loss: Tensor
    free: Tensor


class WorldModel(nn.Module):
    """The encoder and RSSM of the policy (shared, not copied), with the decoder, reward head and continue head."""

    def __init__(self, spec: StreamSpec, settings: Settings, policy: Policy) -> None:
        super().__init__()
        networks, self.optimization = settings.networks, settings.optimization
        self.encoder, self.rssm = policy.encoder, policy.rssm
        self.decoder = Decoder(self.rssm.feat_dim, spec, networks)
        self.reward = ScalarHead(self.rssm.feat_dim, REWARD_LAYERS, networks)
        self.cont = ScalarHead(self.rssm.feat_dim, CONT_LAYERS, networks) if networks.continue_head else None
        has_images = any(entry.is_image for entry in spec.obs.values())
        default = IMAGE_FREE_NATS if has_images else VECTOR_FREE_NATS
        self.free_nats = default if self.optimization.free_nats is None else self.optimization.free_nats

    def embed(self, obs: dict[str, Tensor]) -> Tensor:
        """Return the part of the first posterior layer that depends on the observations, (..., D).

        Shapes: entries (..., *shape), vectors normalised.
        """
        return self.rssm.embed_share(self.encoder(obs))

    def observe(
        self,
        obs: dict[str, Tensor],
        action: Tensor,
        is_first: Tensor,
        noise: Tensor,
        *,
        scan: Callable[[Belief, Sequence[Tensor]], Posterior] | None = None,
        embed: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> Posterior:
        """Return posterior beliefs along windows. They start from a belief of zeros, and again at every `is_first`.

        scan: unrolls the RSSM's posterior step, by default with `unroll`; embed: by default `self.embed`. A gradient
        step passes faster forms of both.
        Shapes: obs entries (B, L, *shape) with vectors normalised, action (B, L, A), is_first (B, L) bool,
        noise (L, B, S); result (B, L, ...).
        """
        num_sequences, length = is_first.shape
        assert action.shape[:2] == is_first.shape, action.shape
        assert noise.shape == (length, num_sequences, self.rssm.stoch_dim), noise.shape
        share = (embed or self.embed)(obs)  # (B, L, D)
        scan = scan or partial(unroll, self.rssm.posterior_step)
        inputs = (action.transpose(0, 1), share.transpose(0, 1), is_first[..., None].transpose(0, 1), noise)
        return scan(self.rssm.initial(num_sequences), inputs)

    def loss(self, obs: dict[str, Tensor], posterior: Posterior, reward: Tensor, is_terminal: Tensor) -> ModelLoss:
        """Return the negative log-likelihoods plus the KL, averaged over windows and steps.

        The target of the reward is scaled by `reward_scale`. The target of the continue head is gamma, or 0 where the
        task ended; a time-out is not an end.
        Shapes: obs as in `observe`, reward and is_terminal (B, L); all results ().
        Source: arXiv 1912.01603, eq. 10. As in its authors' TensorFlow 2 code, the free nats limit the mean KL by
        default.
        """
        settings = self.optimization
        assert reward.shape == is_terminal.shape == posterior.mean.shape[:2], reward.shape
        features = feat(posterior.belief)  # (B, L, F)
        loss_obs = self.decoder.nll(features, obs).mean()
        loss_reward = unit_gaussian_nll(reward * settings.reward_scale, self.reward(features), event_dims=0).mean()
        kl = self.kl(posterior)
        total = settings.kl_scale * kl.loss + loss_obs + loss_reward
        loss_cont = torch.zeros_like(loss_obs)
        if self.cont is not None:
            target = settings.gamma * (~is_terminal).float()
            loss_cont = bernoulli_nll(self.cont(features), target).mean()
            total = total + settings.continue_scale * loss_cont
        parts = (loss_obs, loss_reward, loss_cont, kl.mean, kl.free)
        return ModelLoss(total, *(part.detach() for part in parts))

    def kl(self, posterior: Posterior) -> KL:
        """Return KL(posterior || prior) and the loss made of it.

        Where the KL lies below `free_nats`, the loss is that constant and has no gradient. This concerns the mean, or
        each step on its own. With `kl_balance` b, the share b of the gradient moves the prior towards the posterior and
        the share 1 - b moves the posterior towards the prior. The value does not depend on b.
        """
        mean, std = posterior.mean, posterior.std
        prior_mean, prior_std = self.rssm.prior(posterior.belief.deter)
        balance = self.optimization.kl_balance
        if balance is None:
            return self._floored(gaussian_kl(mean, std, prior_mean, prior_std))
        to_prior = self._floored(gaussian_kl(mean.detach(), std.detach(), prior_mean, prior_std))
        to_posterior = self._floored(gaussian_kl(mean, std, prior_mean.detach(), prior_std.detach()))
        return to_prior._replace(loss=balance * to_prior.loss + (1 - balance) * to_posterior.loss)

    def _floored(self, kl: Tensor) -> KL:
        """Limit a KL (B, L) from below by the free nats."""
        mean = kl.mean()
        if self.optimization.free_nats_per == "step":
            return KL(mean, kl.clamp_min(self.free_nats).mean(), (kl < self.free_nats).float().mean())
        return KL(mean, mean.clamp_min(self.free_nats), (mean < self.free_nats).float())
