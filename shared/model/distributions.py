"""Distributions as plain functions of their parameters, in float32.

`torch.distributions` synchronises with the device when it checks its arguments. Only the tests use it, as an oracle.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
MAX_RAW = math.atanh(1 - 2.0**-24)  # beyond it, tanh is 1 in float32, where the log-density of an action is not defined


def gaussian_kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """Return KL(N(mean, std) || N(prior_mean, prior_std)), summed over the last dimension.

    Shapes: (..., S) to (...).
    Units: nats.
    """
    ratio = (std / prior_std).square()
    distance = ((mean - prior_mean) / prior_std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def unit_gaussian_nll(target: Tensor, mean: Tensor, *, event_dims: int) -> Tensor:
    """Return -log N(target; mean, 1), summed over the last `event_dims` dimensions.

    Shapes: (..., *event) to (...).
    Units: nats.
    """
    nll = 0.5 * (target - mean).square() + HALF_LOG_TAU
    return nll.flatten(-event_dims).sum(-1) if event_dims else nll


def bernoulli_nll(logit: Tensor, target: Tensor) -> Tensor:
    """Return -log Bernoulli(target; logit) in nats, for targets in [0, 1]. All shapes are equal."""
    return F.softplus(logit) - target * logit


def tanh_normal_log_prob(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of the action tanh(raw), with raw ~ N(mean, std), summed over the last dimension.

    Shapes: (..., A) to (...).
    """
    raw = raw.clamp(-MAX_RAW, MAX_RAW)
    normal = -0.5 * ((raw - mean) / std).square() - std.log() - HALF_LOG_TAU
    return (normal - log_tanh_slope(raw)).sum(-1)


def normal_log_prob(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of N(mean, std) at `raw`, summed over the last dimension. Shapes: (..., A) to (...).

    The log-density of tanh(raw) differs from it by a number that does not depend on mean and std.
    """
    return (-0.5 * ((raw - mean) / std).square() - std.log() - HALF_LOG_TAU).sum(-1)


def log_tanh_slope(raw: Tensor) -> Tensor:
    """Return the logarithm of the derivative of tanh at `raw`. It is exact for every `raw`, also far from 0."""
    return 2 * (math.log(2) - raw - F.softplus(-2 * raw))


def tanh_normal_entropy(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Return a one-sample estimate of the entropy of the action tanh(mean + std * noise), with noise ~ N(0, 1).

    The estimate is minus the log-density at that sample, and its gradient is unbiased. It does not use
    `tanh_normal_log_prob`: the clamp there would remove the gradient of saturated actions, and an entropy bonus is
    meant for these.
    Shapes: (..., A) to (...).
    Units: nats.
    """
    normal = 0.5 * noise.square() + std.log() + HALF_LOG_TAU
    return (normal + log_tanh_slope(mean + std * noise)).sum(-1)


def tanh_normal_mode(
    mean: Tensor, std: Tensor, *, num_samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Return for each row the sampled action, out of `num_samples`, with the highest density.

    tanh(mean) is not the mode: the density of a wide tanh-Normal is highest near -1 and 1.
    Shapes: (E, A) to (E, A).
    """
    raw = mean + std * torch.randn(num_samples, *mean.shape, device=mean.device, generator=generator)  # (100, E, A)
    best = tanh_normal_log_prob(raw, mean, std).argmax(0)  # (E,)
    return torch.tanh(raw.gather(0, best[None, :, None].expand(1, *mean.shape)).squeeze(0))
