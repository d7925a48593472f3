"""Dreamer's gradient step on one screen: the algorithm of arXiv 1912.01603, without anything that makes it fast.

One step learns three things from a batch of replayed sequences:

    world model   Roll the RSSM along the recorded actions and observations. Learn to reconstruct observations and
                  rewards from its beliefs, and to predict each belief before its observation is seen.
    actor         From every belief, imagine H steps: the actor acts and the RSSM predicts what follows. Learn the
                  actions that lead to high returns, with gradients that flow back through the imagined steps.
    critic        Learn to predict the returns of the imagined beliefs.

A run uses `learner_proc.gradient_step`, which computes the same numbers faster. This file is for reading. The tests
also use it as their oracle: they compare every metric, gradient and parameter of the two steps. It follows all settings
of the algorithm but two: every product is in float32 (no `autocast`), and nothing is compiled (no `compile`).

Shapes: B sequences, L steps, N starts of imagination (B * L by default), H imagined steps, F = size of a feature.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from learner_proc.heads import CRITIC_LAYERS, ScalarHead
from learner_proc.imagination import random_subset
from learner_proc.numbers import Numbers
from learner_proc.returns import ReturnScale
from learner_proc.world_model import WorldModel
from shared import metrics
from shared.metrics import Metric
from shared.model.distributions import (
    bernoulli_nll,
    gaussian_kl,
    normal_log_prob,
    tanh_normal_entropy,
    unit_gaussian_nll,
)
from shared.model.policy import Policy
from shared.model.rssm import Belief, feat

if TYPE_CHECKING:
    from tensordict import TensorDict

    from shared.config import Settings
    from shared.stream import StreamSpec

Gaussian: TypeAlias = tuple[Tensor, Tensor]  # mean and standard deviation
GRAD_NORMS = (metrics.GRAD_NORM_MODEL, metrics.GRAD_NORM_ACTOR, metrics.GRAD_NORM_VALUE)
CLIPPED = (metrics.CLIPPED_MODEL, metrics.CLIPPED_ACTOR, metrics.CLIPPED_VALUE)


class PlainStep:
    """The networks and their optimisers; each call updates all of them once.

    It is one class because a reader should find the whole algorithm in one place.
    """

    def __init__(self, spec: StreamSpec, settings: Settings, *, device: torch.device) -> None:
        """Create the networks from torch's global generator, in the same order as `GradientStep` does."""
        self.options, options = settings.optimization, settings.optimization
        self.policy = Policy(spec, settings.networks).to(device)  # normaliser, encoder, RSSM and actor
        self.world_model = WorldModel(spec, settings, self.policy).to(device)  # the same encoder and RSSM, with heads
        self.critic = ScalarHead(self.policy.rssm.feat_dim, CRITIC_LAYERS, settings.networks).to(device)
        self.slow_critic, self.return_scale = copy.deepcopy(self.critic), ReturnScale().to(device)
        parts = {self.world_model: options.world_model_lr, self.policy.actor: options.actor_lr}
        parts[self.critic] = options.value_lr
        self.optimisers = [Adam(part, lr, options.adam_eps, options.grad_clip) for part, lr in parts.items()]
        self.measured: dict[Metric, Tensor] = {}

    def __call__(self, batch: TensorDict) -> Numbers:
        """Update everything once and return what was measured. Shapes: batch [B, L], laid out as in `shared.stream`."""
        self.measured = {}
        model_loss, beliefs = self.model_loss(batch)
        start, terminal = self.choose_starts(beliefs, batch["is_terminal"])
        features, entropy, log_prob = self.imagine(start)
        actor_loss, target, weight = self.actor_loss(start, features, entropy, log_prob, terminal)
        losses = (model_loss, actor_loss, self.critic_loss(features, target, weight))
        # Take all gradients before any update, so that all of them are computed with the same parameters.
        grads = [torch.autograd.grad(loss, adam.params) for loss, adam in zip(losses, self.optimisers, strict=True)]
        norms = [adam.step(own) for adam, own in zip(self.optimisers, grads, strict=True)]
        if norms[-1].isfinite() and self.options.slow_critic_decay is not None:
            for slow, new in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
                slow.data.lerp_(new.data, 1 - self.options.slow_critic_decay)
        self.measured |= dict(zip(GRAD_NORMS, norms, strict=True))
        self.measured |= {metric: norm > self.options.grad_clip for metric, norm in zip(CLIPPED, norms, strict=True)}
        self.measured[metrics.SKIPPED] = ~torch.stack(norms).isfinite().all()
        return Numbers.of(self.measured)

    # ---- the world model ------------------------------------------------------------------------------------------

    def model_loss(self, batch: TensorDict) -> tuple[Tensor, Belief]:
        """Return the loss of the world model (eq. 10 of the paper) and the beliefs (B, L, ...)."""
        model, options = self.world_model, self.options
        obs = self.policy.normaliser(batch.get("obs").to_dict())
        beliefs, posterior, prior = self.observe(obs, batch["action"], batch["is_first"])
        features, reward = feat(beliefs), batch["reward"] * options.reward_scale
        loss_obs = model.decoder.nll(features, obs).mean()
        loss_reward = unit_gaussian_nll(reward, model.reward(features), event_dims=0).mean()
        loss_cont = torch.zeros_like(loss_obs)
        if model.cont is not None:
            # The head learns the discount: gamma, or 0 where the task ended. A time-out is not an end.
            discount = (~batch["is_terminal"]).float() * options.gamma
            loss_cont = bernoulli_nll(model.cont(features), discount).mean()
        loss_kl = self.kl_loss(posterior, prior)
        loss = options.kl_scale * loss_kl + loss_obs + loss_reward + options.continue_scale * loss_cont
        self.measured |= {metrics.LOSS_MODEL: loss, metrics.LOSS_OBS: loss_obs}
        self.measured |= {metrics.LOSS_REWARD: loss_reward, metrics.LOSS_CONT: loss_cont}
        return loss, beliefs

    def observe(self, obs: dict[str, Tensor], actions: Tensor, is_first: Tensor) -> tuple[Belief, Gaussian, Gaussian]:
        """Roll the RSSM along the sequences; return beliefs, posteriors and priors, each (B, L, ...)."""
        rssm, (num_sequences, length) = self.world_model.rssm, is_first.shape
        noise = torch.randn(length, num_sequences, rssm.stoch_dim, device=actions.device)
        embed = self.world_model.embed(obs)  # (B, L, D)
        belief, steps = rssm.initial(num_sequences), []
        for t in range(length):
            # An episode starts from a belief and an action of zeros, also in the middle of a sequence.
            first = is_first[:, t, None]
            belief = Belief(belief.deter.masked_fill(first, 0.0), belief.stoch.masked_fill(first, 0.0))
            deter = rssm.transition(belief, actions[:, t].masked_fill(first, 0.0))  # h_t = f(h_t-1, z_t-1, a_t-1)
            prior = rssm.prior(deter)  # p(z_t | h_t)
            mean, std = rssm.posterior(deter, embed[:, t])  # q(z_t | h_t, x_t)
            belief = Belief(deter, mean + std * noise[t])  # z_t is a sample of the posterior
            steps.append((*belief, mean, std, *prior))
        deter, stoch, mean, std, prior_mean, prior_std = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        return Belief(deter, stoch), (mean, std), (prior_mean, prior_std)

    def kl_loss(self, posterior: Gaussian, prior: Gaussian) -> Tensor:
        """Return KL(posterior || prior), limited from below by the free nats."""
        balance = self.options.kl_balance
        if balance is None:
            return self.floored(gaussian_kl(*posterior, *prior))
        # KL balancing (arXiv 2010.02193): a part of the gradient moves the prior, the rest moves the posterior.
        to_prior = self.floored(gaussian_kl(*detached(posterior), *prior))
        to_posterior = self.floored(gaussian_kl(*posterior, *detached(prior)))
        return balance * to_prior + (1 - balance) * to_posterior

    def floored(self, kl: Tensor) -> Tensor:
        """Return the mean KL. Below the free nats it is a constant, so nothing is learned there. Shapes: kl (B, L)."""
        limited = kl if self.options.free_nats_per == "step" else kl.mean()
        below = (limited < self.world_model.free_nats).float()
        self.measured |= {metrics.KL: kl.mean(), metrics.KL_FREE: below.mean()}
        return limited.clamp_min(self.world_model.free_nats).mean()

    # ---- actor and critic -----------------------------------------------------------------------------------------

    def choose_starts(self, beliefs: Belief, is_terminal: Tensor) -> tuple[Belief, Tensor]:
        """Return the beliefs (N, ...) that imagination starts from, detached, and whether each ended the task (N,)."""
        chosen: Tensor | slice = slice(None)
        if self.options.imagination_starts is not None:
            chosen = random_subset(is_terminal.numel(), self.options.imagination_starts, is_terminal.device)
        deter, stoch = (part.detach().flatten(0, 1)[chosen] for part in beliefs)
        return Belief(deter, stoch), is_terminal.flatten()[chosen]

    def imagine(self, belief: Belief) -> tuple[Tensor, Tensor, Tensor]:
        """Let the actor act for H steps; return features (N, H, F), and entropy and log-density of actions (N, H)."""
        rssm, actor, horizon = self.world_model.rssm, self.policy.actor, self.options.imagination_horizon
        num_starts, device = belief.deter.shape[0], belief.deter.device
        action_noise = torch.randn(horizon, num_starts, actor.action_dim, device=device)
        noise, steps = torch.randn(horizon, num_starts, rssm.stoch_dim, device=device), []
        for t in range(horizon):
            # The actor's input has no gradient: the actor learns through its actions and the states they lead to.
            action_mean, action_std = actor(feat(belief).detach())
            raw = action_mean + action_std * action_noise[t]
            action, log_prob = torch.tanh(raw), normal_log_prob(raw.detach(), action_mean, action_std)
            deter = rssm.transition(belief, action)
            mean, std = rssm.prior(deter)  # there is no observation, so the prior takes the posterior's place
            belief = Belief(deter, mean + std * noise[t])
            entropy = tanh_normal_entropy(action_mean, action_std, action_noise[t])
            steps.append((feat(belief), entropy, action_std, log_prob))
        features, entropy, action_stds, log_prob = (torch.stack(part, 1) for part in zip(*steps, strict=True))
        self.measured |= {metrics.ACTOR_STD: action_stds.mean(), metrics.ACTOR_ENTROPY: entropy.mean()}
        return features, entropy, log_prob

    def actor_loss(
        self, start: Belief, features: Tensor, entropy: Tensor, log_prob: Tensor, terminal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return minus the mean imagined return (eq. 7), and the targets and weights (N, H - 1) for the critic."""
        options, cont = self.options, self.world_model.cont
        reward = self.world_model.reward(features)  # (N, H)
        critic = self.critic if options.slow_critic_decay is None else self.slow_critic
        value = critic(features)
        discount = torch.full_like(reward, options.gamma) if cont is None else torch.sigmoid(cont(features))
        # The lambda-return (eq. 6), from the last value backwards. A value includes the reward of its own state.
        returns = [value[:, -1]]
        for t in reversed(range(options.imagination_horizon - 1)):
            later = (1 - options.lmbda) * value[:, t + 1] + options.lmbda * returns[0]
            returns.insert(0, reward[:, t] + discount[:, t] * later)
        target = torch.stack(returns[:-1], 1)
        # The weight of a step is the product of all discounts before it: it counts less if the task may have ended.
        alive = torch.ones_like(reward[:, :1]) if cont is None else (~terminal).float()[:, None]
        weight = torch.cat([alive, discount[:, :-2].detach()], 1).cumprod(1)
        scale = self.return_scale(target) if options.return_norm == "percentile" else torch.ones_like(target[0, 0])
        gain = target / scale  # its gradient flows through the imagined steps
        if options.actor_gradient != "dynamics":
            # REINFORCE: an action becomes more likely if its return exceeds the value of the belief before it.
            before = torch.cat([critic(feat(start))[:, None], value[:, :-2]], 1)
            score = log_prob[:, :-1] * ((target - before) / scale).detach()
            gain = score if options.actor_gradient == "reinforce" else 0.9 * score + 0.1 * gain
        loss = -(weight * (gain + options.entropy_scale * entropy[:, :-1])).mean()
        self.measured |= {metrics.LOSS_ACTOR: loss, metrics.RETURN_SCALE: scale, metrics.IMAGINED_RETURN: target.mean()}
        self.measured |= {metrics.IMAGINED_REWARD: reward.mean(), metrics.VALUE_MEAN: value.mean()}
        return loss, target.detach(), weight

    def critic_loss(self, features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Return the negative log-likelihood of the returns under N(value, 1) (eq. 8)."""
        value = self.critic(features.detach())[:, :-1]  # the last step has no return
        loss = (weight * unit_gaussian_nll(target, value, event_dims=0)).mean()
        bias = (weight * (value - target)).sum() / weight.sum().clamp_min(1e-6)
        self.measured |= {metrics.LOSS_VALUE: loss, metrics.VALUE_BIAS: bias}
        return loss


def detached(gaussian: Gaussian) -> Gaussian:
    """Return mean and standard deviation without their gradient."""
    return gaussian[0].detach(), gaussian[1].detach()


class Adam:
    """Adam (arXiv 1412.6980) with a limit on the global norm of the gradients."""

    def __init__(self, module: nn.Module, lr: float, eps: float, clip: float) -> None:
        self.params, self.lr, self.eps, self.clip = list(module.parameters()), lr, eps, clip
        self.num_steps = 0
        self.means = [torch.zeros_like(param) for param in self.params]
        self.squares = [torch.zeros_like(param) for param in self.params]

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...]) -> Tensor:
        """Return the norm before clipping; update the parameters, unless a gradient is not finite."""
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        if not norm.isfinite():
            return norm
        self.num_steps += 1
        shrink = (self.clip / (norm + 1e-6)).clamp_max(1.0)
        for param, grad, mean, square in zip(self.params, grads, self.means, self.squares, strict=True):
            mean.lerp_(shrink * grad, 1 - 0.9)
            square.lerp_((shrink * grad).square(), 1 - 0.999)
            size = (square / (1 - 0.999**self.num_steps)).sqrt() + self.eps
            param -= self.lr * mean / (1 - 0.9**self.num_steps) / size
        return norm
