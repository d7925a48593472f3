"""Distributions as plain functions of their parameters.

`torch.distributions` checks its arguments with host synchronisations, so it serves only as the oracle of the tests.
Everything here expects and returns float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
MAX_RAW = math.atanh(1 - 2.0**-24)  # beyond it tanh is 1 in float32 and a log-density in action space has no meaning


def gaussian_kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(prior_mean, prior_std)) in nats, summed over the last dimension.

    Shapes: (..., S) to (...).
    """
    ratio = (std / prior_std).square()
    distance = ((mean - prior_mean) / prior_std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def unit_gaussian_nll(target: Tensor, mean: Tensor, *, event_dims: int) -> Tensor:
    """-log N(target; mean, 1) in nats, summed over the last `event_dims` dimensions.

    Shapes: (..., *event) to (...).
    """
    nll = 0.5 * (target - mean).square() + HALF_LOG_TAU
    return nll.flatten(-event_dims).sum(-1) if event_dims else nll


def bernoulli_nll(logit: Tensor, target: Tensor) -> Tensor:
    """-log Bernoulli(target; logit) in nats for soft targets in [0, 1]; shapes alike."""
    return F.softplus(logit) - target * logit


def tanh_normal_log_prob(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of the action tanh(raw), raw ~ N(mean, std), summed over the last dimension.

    Shapes: (..., A) to (...).
    """
    raw = raw.clamp(-MAX_RAW, MAX_RAW)
    normal = -0.5 * ((raw - mean) / std).square() - std.log() - HALF_LOG_TAU
    return (normal - log_tanh_slope(raw)).sum(-1)


def log_tanh_slope(raw: Tensor) -> Tensor:
    """ln of the derivative of tanh at `raw`, exact however far out; shapes alike."""
    return 2 * (math.log(2) - raw - F.softplus(-2 * raw))


def tanh_normal_entropy(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """A one-sample estimate, in nats, of the entropy of the action tanh(mean + std * noise), noise ~ N(0, 1).

    It is minus the log-density at that sample, and its gradient is an unbiased one. Not `tanh_normal_log_prob`, whose
    clamp would take the gradient from saturated actions, the very ones an entropy bonus is for.
    Shapes: (..., A) to (...).
    """
    normal = 0.5 * noise.square() + std.log() + HALF_LOG_TAU
    return (normal + log_tanh_slope(mean + std * noise)).sum(-1)


def tanh_normal_mode(mean: Tensor, std: Tensor, *, num_samples: int = 100) -> Tensor:
    """The most likely of `num_samples` sampled actions, chosen for each row on its own.

    tanh(mean) is not the mode: a wide tanh-Normal piles up at the ends. Shapes: (E, A) to (E, A).
    """
    raw = mean + std * torch.randn(num_samples, *mean.shape, device=mean.device)  # (100, E, A)
    best = tanh_normal_log_prob(raw, mean, std).argmax(0)  # (E,)
    return torch.tanh(raw.gather(0, best[None, :, None].expand(1, *mean.shape)).squeeze(0))
