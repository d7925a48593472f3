"""Which ends of a collector count as deaths, and when deaths are forgotten."""

from __future__ import annotations

import pytest

from launcher.restart_budget import RestartBudget, pause_s
from shared.progress import Snapshot

HOUR, START_S = 3600.0, 60.0


def progress(phase: str, *, at: float, since: float) -> Snapshot:
    """Return the collector's progress at time `at`, in a phase that began at `since`."""
    return Snapshot(phase, counter=1, changed_at=at, phase_since=since, pid=1, generation=1)


def collect(budget: RestartBudget, began: float, seconds: float) -> None:
    """A collector starts, takes START_S for that, collects for `seconds` and ends."""
    collecting = began + START_S
    budget.started(at=began)
    budget.observe(progress("simulator", at=collecting, since=began))
    budget.observe(progress("collecting", at=collecting, since=collecting))
    budget.observe(progress("waiting", at=collecting + seconds / 2, since=collecting + seconds / 2))
    budget.observe(progress("collecting", at=collecting + seconds, since=collecting + seconds * 3 / 4))
    budget.observe(progress("stopping", at=collecting + seconds + 30.0, since=collecting + seconds))


def collect_and_die(budget: RestartBudget, began: float, seconds: float) -> bool:
    """A collector collects for `seconds` and dies. Return whether another one may start."""
    collect(budget, began, seconds)
    return budget.died()


def test_a_collector_that_dies_every_two_hours_is_restarted_for_a_week() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert all(collect_and_die(budget, began=2 * HOUR * nth, seconds=HOUR) for nth in range(1, 85))
    assert budget.deaths == 1, "only the last death is remembered"


def test_deaths_within_one_hour_of_collecting_use_up_the_budget() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    ends = [collect_and_die(budget, began=2 * HOUR * nth, seconds=HOUR / 2 - 1.0) for nth in (1, 2, 3)]
    assert ends == [True, True, False]


def test_a_death_now_and_then_is_survived_for_ever() -> None:
    budget = RestartBudget(2, healthy_after_s=HOUR)
    assert all(collect_and_die(budget, began=2 * HOUR * nth, seconds=HOUR / 2) for nth in range(1, 400))
    assert budget.deaths == 2, "those of the last hour of collecting"


def test_the_pause_before_a_start_doubles_while_nothing_works() -> None:
    assert [pause_s(deaths, 1.0) for deaths in (0, 1, 2, 3, 4, 10, 11, 10_000)] == [0, 0, 1, 2, 4, 256, 300, 300]
    assert pause_s(9, 0.0) == 0.0


def test_the_time_of_a_start_is_not_collecting() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    allowed = []
    for began in (0.0, 9 * HOUR):
        budget.started(at=began)
        budget.observe(progress("simulator", at=began + 9 * HOUR, since=began))
        allowed.append(budget.died())
    assert allowed == [True, False]


def test_the_collecting_of_one_collector_does_not_count_for_the_next() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    assert collect_and_die(budget, began=0.0, seconds=HOUR)
    assert not collect_and_die(budget, began=HOUR, seconds=1.0)


def test_the_time_of_a_hang_is_not_collecting() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    allowed = []
    for began in (0.0, HOUR):
        budget.started(at=began)
        for _ in range(10):  # the time of its last progress stays the same, however often it is read
            budget.observe(progress("collecting", at=began + 10.0, since=began))
        allowed.append(budget.died())
    assert allowed == [True, False]


@pytest.mark.parametrize(
    ("seconds", "healthy_after_s", "useful"),
    [
        (10 * START_S, HOUR, True),
        (10 * START_S - 1.0, HOUR, False),
        (99.0, 100.0, False),
        (100.0, 100.0, True),
        (0.0, 0.0, True),
    ],
)
def test_work_is_useful_after_ten_times_the_start_or_after_healthy_after_s(
    seconds: float, healthy_after_s: float, useful: bool
) -> None:
    budget = RestartBudget(1, healthy_after_s=healthy_after_s)
    collect(budget, began=0.0, seconds=seconds)
    assert budget.exceeded_memory() == useful
    assert budget.deaths == 0, "exceeded_memory counts no death"


def test_a_collector_that_collected_nothing_did_no_useful_work() -> None:
    budget = RestartBudget(1, healthy_after_s=0.0)
    budget.started(at=0.0)
    budget.observe(progress("simulator", at=9.0, since=1.0))
    assert not budget.exceeded_memory()


def test_a_start_that_no_observation_saw_still_counts_from_its_beginning() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    budget.started(at=5.0)
    budget.observe(progress("collecting", at=5.2, since=5.1))
    assert not budget.exceeded_memory()


def test_useful_work_is_that_of_the_present_collector_alone() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, began=0.0, seconds=HOUR / 2)
    assert budget.exceeded_memory()
    collect(budget, began=HOUR, seconds=9 * START_S)
    assert not budget.exceeded_memory()


def test_deaths_are_forgotten_although_memory_restarts_lie_between() -> None:
    budget, began = RestartBudget(2, healthy_after_s=HOUR), 0.0
    for _ in range(5):  # about a week: a memory restart every 50 minutes and a crash every 36 hours
        for _ in range(43):
            began += 50 * 60.0
            collect(budget, began, seconds=48 * 60.0)
            assert budget.exceeded_memory()
        began += 50 * 60.0
        assert collect_and_die(budget, began, seconds=60.0)
    assert budget.deaths == 1


def test_only_collecting_since_the_last_death_makes_deaths_forgotten() -> None:
    budget = RestartBudget(1, healthy_after_s=HOUR)
    collect(budget, began=0.0, seconds=HOUR / 2)
    assert budget.exceeded_memory()
    assert collect_and_die(budget, began=HOUR, seconds=60.0)
    assert not collect_and_die(budget, began=2 * HOUR, seconds=HOUR / 2 + 1.0), "the first half hour no longer counts"
