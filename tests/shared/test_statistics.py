"""Statistics of returns, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from shared.statistics import interquartile_mean, return_statistics


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([7.0], 7.0),
        ([0.0, 10.0], 5.0),
        ([100.0, 2.0, 4.0, -50.0], 3.0),
        # The middle half of five values has the width 2.5: 3/4 of the second, the third, 3/4 of the fourth.
        ([1.0, 2.0, 3.0, 5.0, 90.0], (0.75 * 2 + 3 + 0.75 * 5) / 2.5),
        (list(range(100)), 49.5),
    ],
)
def test_the_interquartile_mean_is_the_mean_of_the_middle_half(returns: list[float], expected: float) -> None:
    assert float(interquartile_mean(np.array(returns))) == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_equal_returns_is_a_point() -> None:
    found = return_statistics([3.0] * 8)
    for estimate in (found.mean, found.median, found.iqm):
        assert (estimate.value, estimate.low, estimate.high) == (3.0, 3.0, 3.0)


def test_the_interval_of_the_mean_agrees_with_its_standard_error() -> None:
    returns = np.random.default_rng(1).normal(50.0, 10.0, size=400).tolist()
    found = return_statistics(returns).mean
    error = 1.96 * float(np.std(returns)) / 20
    assert found.value == pytest.approx(np.mean(returns), rel=1e-12)
    assert found.low == pytest.approx(found.value - error, abs=0.25 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.25 * error)
    assert return_statistics(returns).mean == found, "the resamples are fixed by their seed"
