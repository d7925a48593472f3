"""Statistics of returns: mean, median and interquartile mean, each with a bootstrap interval. Torch-free.

The interquartile mean (IQM) is the mean of the middle half of the returns. Source: arXiv 2108.13264.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, and the interval that contains it in 95 % of the bootstrap resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ReturnStatistics:
    """The statistics of the returns of several episodes."""

    mean: Estimate
    median: Estimate
    iqm: Estimate


def interquartile_mean(returns: NDArray) -> NDArray:
    """Return the mean of the middle half along the last axis.

    A value at the edge of the middle half counts in part: of five values, the second and the fourth count 3/4 each.
    """
    ordered, size = np.sort(returns, -1), returns.shape[-1]
    places = np.arange(size)
    weights = np.clip(np.minimum(places + 1, 0.75 * size) - np.maximum(places, 0.25 * size), 0.0, 1.0)
    return (ordered * weights).sum(-1) / weights.sum()


def return_statistics(returns: Sequence[float], *, seed: int = 0) -> ReturnStatistics:
    """Return the statistics of at least one return. seed: of the resamples."""
    sample = np.asarray(returns, dtype=np.float64)
    assert sample.ndim == 1 and sample.size > 0, sample.shape
    picks = np.random.default_rng(seed).integers(sample.size, size=(NUM_RESAMPLES, sample.size))
    resampled = sample[picks]

    def estimate(statistic: Callable[[NDArray], NDArray]) -> Estimate:
        low, high = np.quantile(statistic(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(statistic(sample)), float(low), float(high))

    return ReturnStatistics(
        mean=estimate(lambda values: values.mean(-1)),
        median=estimate(lambda values: np.median(values, -1)),
        iqm=estimate(interquartile_mean),
    )
