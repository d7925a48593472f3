"""Evaluations: whole episodes of one policy version, the same number in each column, and then newer weights."""

from __future__ import annotations

import pytest
import torch

from collector_proc.acting_policy import ActingPolicy
from collector_proc.episodes import EpisodeTracker, FinishedEpisodes
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.messages import EPISODE_KINDS
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.evaluating import evaluations_in

E, A = 3, 2
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32")}, A)
NETWORKS = NetworkSettings(state_dim=4, rssm_hidden_dim=8, hidden_dim=8, init_std=1.0)
LENGTHS = [5, 3, 4]  # agent steps of every episode, by environment; environments 1 and 2 evaluate


def arrivals(ticks: int, *, resets_inside: bool = False, lengths: list[int] = LENGTHS) -> list[Arrival]:
    """Return the arrivals of episodes with these lengths. The reward is 1, so that a return is a length."""
    out = []
    for tick in range(ticks):
        # A deferred reset takes a tick of its own.
        period = [length if resets_inside else length + 1 for length in lengths]
        phase = [(tick - resets_inside) % every for every in period]
        first = torch.tensor([tick == 0 or (at == 0 and (tick > 1 or not resets_inside)) for at in phase])
        last = torch.tensor([tick > 0 and at == every - 1 for at, every in zip(phase, period, strict=True)])
        reward = torch.where(first & torch.tensor(not resets_inside or tick == 0), 0.0, 1.0)
        obs = {"policy": torch.full((E, 3), float(tick))}
        out.append(Arrival(obs, reward, first, last, last, acting_obs=obs if resets_inside else None))
    return out


def run(rows: list[Arrival], *, chunk: int, publish_every: int = 1, per_column: int = 1) -> list[FinishedEpisodes]:
    """Follow arrivals. A newer version appears every `publish_every` ticks; it is evaluated as soon as it is due."""
    evaluations = evaluations_in((1, 2), E, per_column=per_column)
    tracker, chunks = EpisodeTracker(SPEC, ticks=chunk, evaluations=evaluations), []
    for tick, row in enumerate(rows):
        tracker.add(row, random=False)
        if (tick + 1) % chunk == 0:
            tracker.send()
            chunks.append(tracker.take(100))
        version = 1 + tick // publish_every
        if evaluations.is_due(version):
            evaluations.begin(version, row.is_first if row.acting_obs is None else None)
    return chunks


def episodes(chunks: list[FinishedEpisodes], kind: str) -> list[tuple[int, int]]:
    """Return version and length of every episode of a kind, in the order in which they ended."""
    index = EPISODE_KINDS.index(kind)
    return [
        (version, length)
        for part in chunks
        for version, length, own in zip(part.versions, part.lengths, part.kinds, strict=True)
        if own == index
    ]


@pytest.mark.parametrize("resets_inside", [False, True])
@pytest.mark.parametrize(("chunk", "per_column"), [(4, 1), (10, 1), (10, 2), (60, 1)])
def test_an_evaluation_is_the_same_number_of_whole_episodes_in_each_column(chunk, per_column, resets_inside):
    chunks = run(arrivals(120, resets_inside=resets_inside), chunk=chunk, per_column=per_column)
    counted = episodes(chunks, "eval")
    versions = sorted({version for version, _ in counted})[:-1]  # the last one may be incomplete
    assert len(versions) >= 3
    for version in versions:
        lengths = [length for own, length in counted if own == version]
        assert sorted(lengths) == [3] * per_column + [4] * per_column, version
    assert {length for _, length in episodes(chunks, "waiting")} <= {3, 4}
    assert all(part.returns == [float(length) for length in part.lengths] for part in chunks)


def test_episodes_that_began_with_older_weights_do_not_count():
    """Versions appear at ticks 0 and 6, in the middle of episodes of both columns."""
    chunks = run(arrivals(28), chunk=28, publish_every=6)
    assert episodes(chunks, "eval")[:4] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert episodes(chunks, "waiting")[0] == (0, 3), "column 1 had begun an episode with version 1 when 2 appeared"


def test_columns_whose_episodes_end_together_change_weights_without_an_episode_of_both():
    chunks = run(arrivals(41, lengths=[3, 3, 3]), chunk=41)
    assert [version for version, _ in episodes(chunks, "eval")[:6]] == [1, 1, 4, 4, 8, 8]
    assert episodes(chunks, "waiting") == []


def test_a_version_is_evaluated_once():
    evaluations = evaluations_in((1,), E)
    assert not evaluations.is_due(0) and evaluations.is_due(1)
    evaluations.begin(1)
    assert not evaluations.is_due(2), "column 1 has not played"
    done = torch.tensor([False, True, False])
    evaluations.count(done, done)
    assert not evaluations.is_due(1) and evaluations.is_due(2)
    assert not evaluations_in((), E).is_due(1)


def acting() -> ActingPolicy:
    torch.manual_seed(0)
    settings = CollectorSettings(eval_envs=1, eval_action="mean")
    return ActingPolicy(SPEC, NETWORKS, settings, device=torch.device("cpu"), seed=3, random_ticks=0)


def test_evaluation_columns_act_with_the_weights_of_the_version_that_is_evaluated(monkeypatch):
    monkeypatch.setattr("shared.model.policy.normal_like", lambda x, generator: torch.zeros_like(x))
    one, two, actions = acting(), acting(), []
    rows = arrivals(7, lengths=[3, 3, 3])
    for tick, row in enumerate(rows):
        if tick in (1, 5):  # newer weights, in the middle of an episode
            for parameter in two.policy.parameters():
                parameter.add_(0.1)
        version = 1 + (tick >= 1) + (tick >= 5)
        policies = (one, 1), (two, version)
        for policy, number in policies:
            policy.evaluations.count(row.is_first, row.is_last)
            actions.append(policy.act(row, torch.zeros(E, A), version=number).clone())
    equal = [(a == b).all(1).tolist() for a, b in zip(actions[::2], actions[1::2], strict=True)]
    assert equal[0] == [True] * E
    assert equal[1] == equal[2] == [False, False, True], "column 2 evaluates version 1"
    assert [row[2] for row in equal[3:]] == [False] * 4, "its first episode ended at tick 3, so version 2 acts"
    versions = two.evaluations.version_of(1), two.evaluations.version_of(2)
    assert versions == (1, 2) and two.evaluations.number == 2, "version 3 waits until the second evaluation is over"


def test_the_copy_of_the_weights_keeps_its_memory():
    policy = acting()
    addresses = [weight.data_ptr() for weight in policy._frozen_weights]
    row = arrivals(1)[0]
    policy.act(row, torch.zeros(E, A), version=1)
    assert policy.evaluations.number == 1
    assert [weight.data_ptr() for weight in policy._frozen.state_dict().values()] and addresses == [
        weight.data_ptr() for weight in policy._frozen_weights
    ]
