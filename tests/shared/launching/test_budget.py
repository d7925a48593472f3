"""Deaths of the collector count against the budget until an incarnation has proved healthy."""

from __future__ import annotations

from shared.launching.budget import RestartBudget
from shared.supervision import Snapshot

HOUR = 3600.0


def seen(phase: str, *, pid: int, at: float, since: float) -> Snapshot:
    """The collector's account of time `at`, in its phase since `since`."""
    return Snapshot(phase, counter=1, changed_at=at, phase_since=since, pid=pid, generation=1)


START_S = 60.0


def live(budget: RestartBudget, pid: int, began: float, seconds: float) -> bool:
    """An incarnation that starts for a minute, collects for `seconds` and dies; whether another may follow."""
    collect(budget, pid, began, seconds)
    return budget.allows_another()


def collect(budget: RestartBudget, pid: int, began: float, seconds: float) -> None:
    streaming = began + START_S
    budget.observe(seen("starting", pid=0, at=began, since=began))
    budget.observe(seen("simulator", pid=pid, at=streaming, since=began))
    budget.observe(seen("collecting", pid=pid, at=streaming, since=streaming))
    budget.observe(seen("waiting", pid=pid, at=streaming + seconds / 2, since=streaming + seconds / 2))
    budget.observe(seen("collecting", pid=pid, at=streaming + seconds, since=streaming + seconds * 3 / 4))
    budget.observe(seen("stopping", pid=pid, at=streaming + seconds + 30.0, since=streaming + seconds))


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


def test_an_end_for_memory_is_excused_after_ten_times_its_start_or_the_time_that_proves_health() -> None:
    for seconds, healthy_after_s, excused in (
        (10 * START_S, HOUR, True),
        (10 * START_S - 1.0, HOUR, False),
        (99.0, 100.0, False),
        (100.0, 100.0, True),
        (0.0, 0.0, True),
    ):
        budget = RestartBudget(1, healthy_after_s=healthy_after_s)
        collect(budget, 1, began=0.0, seconds=seconds)
        assert budget.excuses() == excused, (seconds, healthy_after_s)
        assert budget.deaths == 0, "whoever asks counts nothing"


def test_an_end_for_memory_before_anything_was_collected_is_not_excused() -> None:
    budget = RestartBudget(1, healthy_after_s=0.0)
    budget.observe(seen("starting", pid=0, at=0.0, since=0.0))
    budget.observe(seen("simulator", pid=1, at=9.0, since=1.0))
    assert not budget.excuses()


def test_an_incarnation_is_excused_by_its_own_collecting_alone() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, 1, began=0.0, seconds=HOUR / 2)
    assert budget.excuses()
    collect(budget, 2, began=HOUR, seconds=9 * START_S)
    assert not budget.excuses()


def test_excused_ends_between_do_not_keep_deaths_from_being_forgotten() -> None:
    budget, pid = RestartBudget(2, healthy_after_s=HOUR), 0
    for _ in range(5):  # a week: an end for memory every 50 minutes, a crash every 36 hours
        for _ in range(43):
            pid += 1
            collect(budget, pid, began=50 * 60.0 * pid, seconds=48 * 60.0)
            assert budget.excuses()
        pid += 1
        assert live(budget, pid, began=50 * 60.0 * pid, seconds=60.0)
    assert budget.deaths == 1


def test_only_what_was_collected_since_the_last_death_forgets_it() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, 1, began=0.0, seconds=HOUR / 2)
    assert budget.excuses()
    assert live(budget, 2, began=HOUR, seconds=60.0)
    assert not live(budget, 3, began=2 * HOUR, seconds=HOUR / 2 + 1.0), "the half hour before the death is spent"
