"""Deaths of the collector count against the budget until an incarnation has proved healthy."""

from __future__ import annotations

from shared.launching.budget import RestartBudget
from shared.supervision import Snapshot

HOUR = 3600.0


def seen(phase: str, *, pid: int, at: float, since: float) -> Snapshot:
    """The collector's account of time `at`, in its phase since `since`."""
    return Snapshot(phase, counter=1, changed_at=at, phase_since=since, pid=pid, generation=1)


def live(budget: RestartBudget, pid: int, began: float, seconds: float) -> bool:
    """An incarnation that starts for a minute, collects for `seconds` and dies; whether another may follow."""
    streaming = began + 60.0
    budget.observe(seen("simulator", pid=pid, at=streaming, since=began))
    budget.observe(seen("collecting", pid=pid, at=streaming, since=streaming))
    budget.observe(seen("waiting", pid=pid, at=streaming + seconds / 2, since=streaming + seconds / 2))
    budget.observe(seen("collecting", pid=pid, at=streaming + seconds, since=streaming + seconds * 3 / 4))
    return budget.allows_another()


def test_a_collector_that_dies_every_two_hours_is_started_again_for_a_week() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert all(live(budget, pid, began=2 * HOUR * pid, seconds=HOUR) for pid in range(1, 85))
    assert budget.deaths == 1, "the last one alone"


def test_deaths_in_quick_succession_use_the_budget_up_however_long_their_starts_took() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert [live(budget, pid, began=2 * HOUR * pid, seconds=HOUR - 1.0) for pid in (1, 2, 3)] == [True, True, False]
    starting = RestartBudget(1, healthy_after_s=HOUR)
    for pid in (1, 2):
        starting.observe(seen("simulator", pid=pid, at=pid * 9 * HOUR, since=0.0))
        may = starting.allows_another()
    assert not may, "hours in a simulator that does not start are no health"


def test_the_health_of_one_incarnation_is_not_the_nexts() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    assert live(budget, 1, began=0.0, seconds=HOUR)
    assert not live(budget, 2, began=HOUR, seconds=1.0)


def test_a_hang_is_no_health() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    for pid in (1, 2):  # its account says when it moved last, however often it is read
        for _ in range(10):
            budget.observe(seen("collecting", pid=pid, at=10.0, since=0.0))
        may = budget.allows_another()
    assert not may
