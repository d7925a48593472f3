"""Chunks and episodes: rows land where they were granted, returns are the collector's own sums."""

import dataclasses

import pytest
import torch

from collector_proc.copies import Copier
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter, EpisodeTracker
from shared.checksum import checksum
from shared.messages import EPISODE_KINDS, MAX_EPISODES
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.late_copier import LateCopier

E, K = 3, 4
SPEC = StreamSpec(E, {"policy": ObsSpec((2,), "float32"), "pixels": ObsSpec((4, 4, 1), "uint8")}, 1)
CPU = torch.device("cpu")
LOUD = 0xAB


def arrival(tick: int, *, first=(), last=(), terminal=(), reward: float = 1.0, acting: bool = False) -> Arrival:
    """Observation 1000 * environment + tick; flags where the environment is named."""
    value = 1000.0 * torch.arange(E) + tick
    flags = [torch.tensor([env in named for env in range(E)]) for named in (first, last, terminal)]
    obs = {"policy": value[:, None].expand(E, 2), "pixels": torch.full((E, 4, 4, 1), tick, dtype=torch.uint8)}
    rewards = torch.where(flags[0], 0.0, torch.full((E,), reward))
    return Arrival(obs, rewards, *flags, acting_obs=obs if acting else None)


def make_writer(capacity: int = 12, copier: Copier | None = None):
    layout = plan_layout(SPEC, capacity)
    slab = torch.full((layout.num_bytes,), LOUD, dtype=torch.uint8)
    ring = ring_views(slab, layout)
    return ChunkWriter(ring, layout, ticks=K, device=CPU, copier=copier), ring, layout


def test_a_chunk_lands_in_its_granted_rows_and_nowhere_else():
    writer, ring, layout = make_writer()
    for tick in range(K):
        writer.add(arrival(tick, first=(0,) if tick == 0 else ()), torch.full((E, 1), 0.25), policy_version=7 + tick)
    assert writer.full
    writer.write(4)
    assert ring["obs", "policy"][4:8, :, 0].tolist() == [[1000.0 * env + tick for env in range(E)] for tick in range(K)]
    assert ring["policy_version"][4:8].tolist() == [7, 8, 9, 10]
    assert ring["is_first"][4:8, 0].tolist() == [True, False, False, False]
    assert ring["reward"][4].tolist() == [0.0, 1.0, 1.0] and (ring["action"][4:8] == 0.25).all()
    assert ring["obs", "pixels"][7].unique().tolist() == [3]
    for entry in layout.fields:
        rows = ring[entry.key]
        for outside in (rows[:4], rows[8:]):
            assert (outside.contiguous().view(-1).view(torch.uint8) == LOUD).all(), entry.name
    assert not writer.full


def test_the_writers_checksum_is_the_rings_and_notices_one_changed_byte():
    writer, ring, layout = make_writer()
    for tick in range(K):
        writer.add(arrival(tick), torch.zeros(E, 1), policy_version=1)
    expected = writer.checksum()
    writer.write(8)
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][8:12] for key in keys) == expected
    ring["obs", "pixels"][9, 1, 2, 2, 0] += 1
    assert checksum(ring[key][8:12] for key in keys) != expected


def test_the_checksum_notices_swapped_rows():
    rows = torch.arange(12.0).view(4, 3)
    assert checksum([rows]) != checksum([rows[[1, 0, 2, 3]]])


def test_the_self_test_pattern_lies_in_the_ring_as_sent():
    writer, ring, layout = make_writer()
    expected, num_bytes, seconds = writer.write_pattern(0)
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][:K] for key in keys) == expected
    assert num_bytes == sum(ring[key][:K].nbytes for key in keys) and seconds > 0
    assert not writer.full


def test_rows_gathered_meanwhile_leave_a_chunk_under_way_alone_and_its_stage_is_free_again_after_the_next():
    copier = LateCopier()
    writer, ring, _ = make_writer(copier=copier)
    for tick in range(3 * K):
        writer.add(arrival(tick), torch.zeros(E, 1), policy_version=tick)
        if writer.full:
            assert writer.arrived() == (tick < K)
            writer.write(tick + 1 - K)
            assert copier.num_late_joins == tick // K, "the stream of the rows waits for the stage's own copies only"
    assert not writer.arrived() and copier.under_way == 1
    assert ring["policy_version"][:].tolist()[: 2 * K] == list(range(2 * K))
    writer.wait()
    assert writer.arrived() and ring["policy_version"][:].tolist() == list(range(3 * K))


def test_the_self_test_finds_the_pattern_in_every_stage():
    writer, ring, layout = make_writer(copier=LateCopier())
    expected, _, _ = writer.write_pattern(0)  # three writes: the last came from the first stage again
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][:K] for key in keys) == expected
    writer.num_rows = K
    writer.write(4)
    writer.wait()
    assert checksum(ring[key][4:8] for key in keys) == expected


def test_episodes_gathered_meanwhile_leave_numbers_under_way_alone():
    copier = LateCopier()
    mask = torch.zeros(E, dtype=torch.bool)
    tracker = EpisodeTracker(SPEC, ticks=2, evaluation=mask, resets_inside=False, copier=copier)
    tracker.add(arrival(0, first=(0, 1, 2)), random=False)
    tracker.add(arrival(1, last=(0,)), random=False)
    tracker.send()
    tracker.add(arrival(2, first=(0,), last=(1, 2)), random=False)
    copier.land()
    assert tracker.take(10) == ([1.0], [1], [0], 1, 3)
    tracker.add(arrival(3, first=(1, 2)), random=False)
    tracker.send()
    copier.land()
    assert tracker.take(10) == ([2.0, 2.0], [2, 2], [0, 0], 2, 3)
    for tick in (4, 5):
        tracker.add(arrival(tick), random=False)
    tracker.send()
    copier.land()
    assert tracker.take(10) == ([], [], [], 0, 2 * E), "the stage of the first chunk was emptied"
    assert tracker.take(10) == ([], [], [], 0, 0) and copier.num_host_waits == 0


def track(ticks, *, resets_inside=False, random=lambda tick: False, evaluation=(2,)):
    mask = torch.tensor([env in evaluation for env in range(E)])
    tracker = EpisodeTracker(SPEC, ticks=len(ticks), evaluation=mask, resets_inside=resets_inside)
    for tick, now in enumerate(ticks):
        tracker.add(now, random=random(tick))
    tracker.send()
    return tracker


EPISODE = [
    arrival(0, first=(0, 1, 2)),
    arrival(1, reward=2.0),
    arrival(2, reward=3.0, last=(0, 2)),
    arrival(3, reward=5.0, first=(0, 2)),
    arrival(4, reward=7.0, last=(1,)),
]


def test_returns_lengths_and_steps_count_decisions_not_resets():
    returns, lengths, kinds, num_episodes, steps = track(EPISODE).take(100)
    assert returns == [5.0, 5.0, 17.0]  # environments 0 and 2 at tick 2; environment 1 gathered 2 + 3 + 5 + 7
    assert lengths == [2, 2, 4]
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["train", "eval", "train"]
    assert num_episodes == 3 and steps == 5 * E - 5  # five of the rows are resets


def test_a_simulator_that_resets_inside_step_has_an_agent_step_in_every_row_but_the_very_first():
    ticks = [
        arrival(0, first=(0, 1, 2), acting=True),
        arrival(1, last=(0, 1, 2), acting=True),
        arrival(2, first=(0, 1, 2), acting=True),
        arrival(3, last=(0, 1, 2), acting=True),
    ]
    finished = track(ticks, resets_inside=True).take(100)
    assert finished.steps == 3 * E and finished.lengths == [1, 1, 1, 2, 2, 2]


def test_a_diverged_row_finishes_no_episode():
    broken = dataclasses.replace(
        arrival(2, reward=0.0, first=(1,), last=(0, 1)), diverged=torch.tensor([False, True, False])
    )
    ticks = [arrival(0, first=(0, 1, 2)), arrival(1, reward=2.0), broken, arrival(3, reward=5.0, first=(0, 1))]
    finished = track([*ticks, arrival(4, reward=7.0, last=(1,))]).take(100)
    assert finished[:3] == ([2.0, 7.0], [2, 1], [0, 0]), "environment 1: what came before is not counted"


def test_an_episode_with_one_random_action_is_called_random():
    kinds = track(EPISODE, random=lambda tick: tick == 1).take(100).kinds
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["random"] * 3
    kinds = track(EPISODE, random=lambda tick: tick <= 0).take(100).kinds
    assert [EPISODE_KINDS[kind] for kind in kinds] == ["train", "eval", "train"], "the reset row has no action"


def many_ends(tracker: EpisodeTracker, spec: StreamSpec, chunk: int, ticks: int) -> None:
    """A chunk in which all environments end at every tick; an episode's return is 100 * chunk + tick."""
    flag = torch.ones(spec.num_envs, dtype=torch.bool)
    obs = {"policy": torch.zeros(spec.num_envs, 1)}
    for tick in range(ticks):
        reward = torch.full((spec.num_envs,), 100.0 * chunk + tick)
        tracker.add(Arrival(obs, reward, flag, flag, torch.zeros_like(flag)), random=False)
    tracker.send()


@pytest.mark.parametrize("num_evaluating", [1, 16, 4095])
def test_with_more_ends_than_a_commit_names_the_newest_are_named_and_all_are_counted(num_evaluating: int):
    spec, ticks = StreamSpec(4096, {"policy": ObsSpec((1,), "float32")}, 1), 2
    mask = torch.zeros(4096, dtype=torch.bool)
    mask[torch.arange(num_evaluating)] = True
    tracker = EpisodeTracker(spec, ticks=ticks, evaluation=mask, resets_inside=False)
    for chunk in range(3):
        many_ends(tracker, spec, chunk, ticks)
        finished = tracker.take(MAX_EPISODES)
        assert finished.num_episodes == 8192 and len(finished.returns) <= MAX_EPISODES
        newest = {kind: value for value, kind in zip(finished.returns, finished.kinds, strict=True)}
        assert newest == {0: 100.0 * chunk + 1, 1: 100.0 * chunk + 1}, "neither kind crowds the other out"
        assert finished.kinds.count(1) == min(2 * num_evaluating, MAX_EPISODES // 2)
        assert all(value >= 100.0 * chunk for value in finished.returns), "nothing is left over from a chunk before"
    assert tracker.take(MAX_EPISODES) == ([], [], [], 0, 0), "and nothing waits"


def test_named_episodes_keep_the_order_in_which_they_ended():
    returns = track(EPISODE).take(2).returns
    assert returns == [5.0, 17.0], "the evaluation's, and the newest of the others"


def test_writing_a_chunk_that_is_not_full_is_an_error():
    writer, _, _ = make_writer()
    writer.add(arrival(0), torch.zeros(E, 1), policy_version=0)
    with pytest.raises(AssertionError):
        writer.write(0)
