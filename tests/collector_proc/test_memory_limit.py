"""The memory limit of a collector."""

from __future__ import annotations

import pytest

from collector_proc.memory_limit import MemoryLimit
from shared.errors import SettingError, SimulatorError
from shared.memory import Memory, MemoryMeter


def make_limit(readings_gb: list[float], limit_gb: float | None, *, incarnation: int = 0) -> MemoryLimit:
    """Return a limit whose meter gives these readings at its measurements; the first is taken at construction."""
    readings = iter([0.0, *readings_gb])
    meter = MemoryMeter("cpu", measure=lambda device: Memory(int(1e9 * next(readings))))
    return MemoryLimit(meter, limit_gb, incarnation=incarnation)


def test_the_first_check_measures_again_and_later_ones_use_a_recent_measurement():
    limit = make_limit([0.5, 9.0], limit_gb=1.0)
    assert limit.check() and limit.held_gb == 0.5
    assert limit.check() and limit.held_gb == 0.5, "the second measurement is not due yet"


def test_without_a_limit_every_amount_is_accepted():
    limit = make_limit([80.0], limit_gb=None)
    assert limit.check() and limit.held_gb == 80.0 and not limit.exceeded


@pytest.mark.parametrize(("incarnation", "error"), [(0, SettingError), (3, SimulatorError)])
def test_an_amount_above_the_limit_at_the_first_check_is_an_error(incarnation, error):
    limit = make_limit([1.25], limit_gb=1.0, incarnation=incarnation)
    with pytest.raises(
        error, match=r"max_rss_gb=1 is below the 1\.25 GB .*; expected .*; set collector.max_rss_gb=2.5"
    ):
        limit.check()
    assert not limit.exceeded
