"""Deaths of the collector count against the budget until an incarnation has proved healthy."""

from __future__ import annotations

from launcher.budget import RestartBudget
from shared.progress import Snapshot

HOUR, START_S = 3600.0, 60.0


def seen(phase: str, *, at: float, since: float) -> Snapshot:
    """The collector's account of time `at`, in its phase since `since`."""
    return Snapshot(phase, counter=1, changed_at=at, phase_since=since, pid=1, generation=1)


def live(budget: RestartBudget, began: float, seconds: float) -> bool:
    """An incarnation that starts for a minute, collects for `seconds` and dies; whether another may follow."""
    collect(budget, began, seconds)
    return budget.allows_another()


def collect(budget: RestartBudget, began: float, seconds: float) -> None:
    streaming = began + START_S
    budget.started(at=began)
    budget.observe(seen("simulator", at=streaming, since=began))
    budget.observe(seen("collecting", at=streaming, since=streaming))
    budget.observe(seen("waiting", at=streaming + seconds / 2, since=streaming + seconds / 2))
    budget.observe(seen("collecting", at=streaming + seconds, since=streaming + seconds * 3 / 4))
    budget.observe(seen("stopping", at=streaming + seconds + 30.0, since=streaming + seconds))


def test_a_collector_that_dies_every_two_hours_is_started_again_for_a_week() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert all(live(budget, began=2 * HOUR * nth, seconds=HOUR) for nth in range(1, 85))
    assert budget.deaths == 1, "the last one alone"


def test_deaths_in_quick_succession_use_the_budget_up_however_long_their_starts_took() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert [live(budget, began=2 * HOUR * nth, seconds=HOUR - 1.0) for nth in (1, 2, 3)] == [True, True, False]
    starting = RestartBudget(1, healthy_after_s=HOUR)
    for began in (0.0, 9 * HOUR):
        starting.started(at=began)
        starting.observe(seen("simulator", at=began + 9 * HOUR, since=began))
        may = starting.allows_another()
    assert not may, "hours in a simulator that does not start are no health"


def test_the_health_of_one_incarnation_is_not_the_nexts() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    assert live(budget, began=0.0, seconds=HOUR)
    assert not live(budget, began=HOUR, seconds=1.0)


def test_a_hang_is_no_health() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    for began in (0.0, HOUR):  # its account says when it moved last, however often it is read
        budget.started(at=began)
        for _ in range(10):
            budget.observe(seen("collecting", at=began + 10.0, since=began))
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
        collect(budget, began=0.0, seconds=seconds)
        assert budget.excuses() == excused, (seconds, healthy_after_s)
        assert budget.deaths == 0, "whoever asks counts nothing"


def test_an_end_for_memory_before_anything_was_collected_is_not_excused() -> None:
    budget = RestartBudget(1, healthy_after_s=0.0)
    budget.started(at=0.0)
    budget.observe(seen("simulator", at=9.0, since=1.0))
    assert not budget.excuses()


def test_a_start_that_was_over_before_anybody_looked_counts_from_its_beginning() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    budget.started(at=5.0)
    budget.observe(seen("collecting", at=5.2, since=5.1))
    assert not budget.excuses()


def test_an_incarnation_is_excused_by_its_own_collecting_alone() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, began=0.0, seconds=HOUR / 2)
    assert budget.excuses()
    collect(budget, began=HOUR, seconds=9 * START_S)
    assert not budget.excuses()


def test_excused_ends_between_do_not_keep_deaths_from_being_forgotten() -> None:
    budget, began = RestartBudget(2, healthy_after_s=HOUR), 0.0
    for _ in range(5):  # a week: an end for memory every 50 minutes, a crash every 36 hours
        for _ in range(43):
            began += 50 * 60.0
            collect(budget, began, seconds=48 * 60.0)
            assert budget.excuses()
        began += 50 * 60.0
        assert live(budget, began, seconds=60.0)
    assert budget.deaths == 1


def test_only_what_was_collected_since_the_last_death_forgets_it() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, began=0.0, seconds=HOUR / 2)
    assert budget.excuses()
    assert live(budget, began=HOUR, seconds=60.0)
    assert not live(budget, began=2 * HOUR, seconds=HOUR / 2 + 1.0), "the half hour before the death is spent"
