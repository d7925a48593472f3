"""Pacing: there is always a side that may continue, and the replay ratio is kept."""

import itertools
from collections import deque

import pytest

from learner_proc.pacing import MAX_GRANTED, Pacing, make_pacing, rows_on_prefill
from shared.config import Settings
from shared.geometry import Geometry


def dead_states(pacing: Pacing, limit: int) -> list[tuple[int, int, int]]:
    """Return every reachable state (collected, granted, replayed) in which nothing can happen, up to `limit` rows."""
    seen, queue, dead = set(), deque([(0, 0, 0)]), []
    while queue:
        state = queue.popleft()
        if state in seen or state[0] > limit:
            continue
        seen.add(state)
        pacing.collected, granted, pacing.replayed = state[0], state[1], state[2]
        moves = []
        if granted > 0:
            moves.append((state[0] + pacing.chunk_frames, granted - 1, state[2]))
        if pacing.may_grant(granted):
            moves.append((state[0], granted + 1, state[2]))
        if pacing.may_step():
            moves.append((state[0], granted, state[2] + pacing.step_frames))
        if not moves:
            dead.append(state)
        queue.extend(moves)
    return dead


SETTINGS = list(itertools.product((1, 3, 10), (1, 7, 25, 100), (0.25, 1.0, 2.5, 16.0), (1, 10, 30), (0, 4)))


@pytest.mark.parametrize("chunk, step, ratio, prefill, pretrain_steps", SETTINGS)
def test_in_every_state_one_side_may_continue(chunk, step, ratio, prefill, pretrain_steps):
    pretrained = rows_on_prefill(pretrain_steps, step_frames=step, ratio=ratio, prefill=prefill)
    pacing = Pacing(chunk, step, ratio, prefill, pretrained)
    assert dead_states(pacing, limit=prefill + 8 * max(chunk, step)) == []


def test_the_search_finds_the_deadlock_of_a_simpler_rule():
    class Simpler(Pacing):
        def may_step(self, granted: int = 0) -> bool:
            assert self.ratio is not None
            return self.prefilled and self.replayed + self.step_frames <= self.ratio * self.collected

        def may_grant(self, granted: int) -> bool:
            assert self.ratio is not None
            return granted < 2 and self.ratio * (self.collected + granted * self.chunk_frames) <= self.replayed

    assert dead_states(Simpler(10, 7, 1.0, 0), limit=100) != []


def test_before_the_prefill_no_step_runs_and_grants_are_not_limited():
    pacing = Pacing(10, 5, 4.0, prefill=50, collected=40)
    assert not pacing.may_step()
    assert pacing.may_grant(0) and not Pacing(10, 5, 4.0, prefill=50, collected=20).may_grant(3 + MAX_GRANTED)
    pacing.collected = 60
    assert pacing.may_step()


@pytest.mark.parametrize("ratio", [0.5, 8.0])
def test_the_ratio_is_kept_whichever_side_is_faster(ratio):
    for collector_speed in (1, 50):
        pacing, granted = Pacing(20, 32, ratio, prefill=40), 0
        for _ in range(3000):
            while pacing.may_grant(granted):
                granted += 1
            for _ in range(min(collector_speed, granted)):
                granted, pacing.collected = granted - 1, pacing.collected + 20
            if pacing.may_step():
                pacing.replayed += 32
        slack = 2 * ratio * 20 + 2 * 32
        assert abs(pacing.replayed - ratio * (pacing.collected - 40)) <= slack


@pytest.mark.parametrize(("pretrain_steps", "expected"), [(0, 0), (3, 3), (100, 25)])
def test_some_steps_follow_the_prefill_at_most_what_the_ratio_gives_for_it(pretrain_steps, expected):
    """The prefill of 200 rows at a ratio of 4 gives 25 steps of 32 rows. Later rows are paid at the ratio alone."""
    pretrained = rows_on_prefill(pretrain_steps, step_frames=32, ratio=4.0, prefill=200)
    pacing = Pacing(20, 32, 4.0, 200, pretrained, collected=200)
    steps = []
    for _ in range(3):
        before = pacing.replayed
        while pacing.may_step():
            pacing.replayed += 32
        steps.append((pacing.replayed - before) // 32)
        assert pacing.may_grant(0), "the collector goes on"
        pacing.collected += 8 * 20
    assert steps == [expected, 20, 20]


def test_a_resumed_run_makes_the_rest_of_the_steps_on_the_prefill():
    settings = Settings()
    settings.optimization.replay_ratio, settings.optimization.pretrain_steps = 2000.0, 100
    geometry = Geometry.of(settings)
    made = [make_pacing(settings, geometry, gradient_steps=steps).pretrained for steps in (0, 30, 100, 500)]
    assert made == [100 * 10_000, 70 * 10_000, 0, 0]
    settings.optimization.replay_ratio = None
    assert make_pacing(settings, geometry).pretrained == 0


def test_without_a_ratio_steps_always_run_and_at_most_two_chunks_are_granted():
    pacing = Pacing(10, 5, None, prefill=10, collected=10)
    assert pacing.may_step()
    assert [pacing.may_grant(granted) for granted in (0, 1, 2)] == [True, True, False]


def test_in_lockstep_a_chunk_and_the_steps_that_it_allows_alternate():
    pacing, granted, order = Pacing(10, 20, 4.0, 20, 80.0, lockstep=True), 0, []
    for _ in range(24):
        assert not (pacing.may_grant(granted) and pacing.may_step(granted)), "the two sides never run at the same time"
        if pacing.may_grant(granted):
            granted, order = 1, [*order, "grant"]
        elif granted:
            granted, pacing.collected = 0, pacing.collected + 10
        else:
            assert pacing.may_step(granted)
            pacing.replayed, order = pacing.replayed + 20, [*order, "step"]
    assert order[:9] == ["grant", "grant", "step", "step", "step", "step", "grant", "step", "step"]
