"""The acting policy: a scan of the recorded rows gives the beliefs that it acted with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from collector_proc.acting_policy import ActingPolicy
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.model.rssm import Belief
from shared.stream import ObsSpec, StreamSpec

E, A = 4, 2
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32")}, A)
NETWORKS = NetworkSettings(state_dim=4, rssm_hidden_dim=8, hidden_dim=8, init_std=1.0)
NO_NOISE = torch.zeros(1, NETWORKS.state_dim)


def make_acting(*, random_ticks: int = 0, **collector) -> ActingPolicy:
    settings = CollectorSettings(eval_envs=1, eval_action="mean") if not collector else CollectorSettings(**collector)
    return ActingPolicy(SPEC, NETWORKS, settings, device=torch.device("cpu"), seed=3, random_ticks=random_ticks)


def flags(*envs: int) -> torch.Tensor:
    return torch.tensor([env in envs for env in range(E)])


def arrivals(seed: int, ticks: int, *, ends: dict[int, int], resets_inside: bool) -> list[Arrival]:
    """Return random arrivals. ends: environment -> tick of its `is_last`; its `is_first` is one tick later.

    resets_inside: like a simulator that resets inside `step`, give `acting_obs`, at `is_last` that of the new episode.
    """
    source = torch.Generator().manual_seed(seed)
    out = []
    for tick in range(ticks):
        first = flags(*(env for env in range(E) if tick == 0 or ends.get(env) == tick - 1))
        last = flags(*(env for env, at in ends.items() if at == tick))
        obs = {"policy": torch.randn(E, 3, generator=source)}
        acting = {"policy": torch.randn(E, 3, generator=source)} if resets_inside else None
        if acting is not None:
            acting = {"policy": torch.where(last[:, None], acting["policy"], obs["policy"])}
        out.append(Arrival(obs, torch.zeros(E), first, last, last, acting_obs=acting))
    return out


def scan(acting: ActingPolicy, rows: list[Arrival], actions: list[torch.Tensor], env: int) -> Belief:
    """Return the belief that the world model's scan of one environment's recorded rows ends with, without noise."""
    rssm, belief = acting.policy.rssm, acting.policy.initial_belief(1)
    for row, action in zip(rows, actions, strict=True):
        obs = {"policy": row.obs["policy"][env : env + 1]}
        share = rssm.embed_share(acting.policy.encoder(acting.policy.normaliser(obs)))
        belief = rssm.posterior_step(
            belief, action[env : env + 1], share, row.is_first[env : env + 1, None], NO_NOISE
        ).belief
    return belief


def play(acting: ActingPolicy, rows: list[Arrival], monkeypatch) -> tuple[list[torch.Tensor], list[Belief]]:
    """Act on arrivals without noise. Return the recorded actions (0 at `is_first`) and the beliefs acted with."""
    monkeypatch.setattr("shared.model.policy.normal_like", lambda x, generator: torch.zeros_like(x))
    action, recorded, beliefs = torch.zeros(E, A), [], []
    for row in rows:
        action = torch.where(row.is_first[:, None], 0.0, action)
        recorded.append(action)
        action = acting.act(row, action, version=1)
        beliefs.append(acting.belief)
    return recorded, beliefs


def test_evaluation_environments_are_spread_evenly():
    assert make_acting(eval_envs=2).evaluations.mask.tolist() == [False, True, False, True]
    assert not make_acting(eval_envs=0).evaluations.mask.any()


@pytest.mark.parametrize("resets_inside", [False, True])
def test_a_scan_of_the_recorded_rows_gives_the_beliefs_that_were_acted_with(monkeypatch, resets_inside):
    acting = make_acting()
    rows = arrivals(int(resets_inside), 9, ends={0: 4, 2: 6}, resets_inside=resets_inside)
    recorded, beliefs = play(acting, rows, monkeypatch)
    for env in range(E):
        torch.testing.assert_close(
            scan(acting, rows, recorded, env).deter[0], beliefs[-1].deter[env], rtol=1e-5, atol=1e-6
        )


def test_the_belief_after_a_reset_does_not_depend_on_the_episode_before_it(monkeypatch):
    one, two = make_acting(), make_acting()
    rows = arrivals(2, 8, ends={1: 3}, resets_inside=False)
    other = arrivals(9, 8, ends={1: 3}, resets_inside=False)
    mixed = other[:4] + rows[4:]
    beliefs_one, beliefs_two = play(one, rows, monkeypatch)[1], play(two, mixed, monkeypatch)[1]
    assert torch.equal(beliefs_one[-1].deter[1], beliefs_two[-1].deter[1])
    assert not torch.equal(beliefs_one[-1].deter[0], beliefs_two[-1].deter[0])


def test_actions_are_uniform_random_before_weights_are_adopted():
    acting = make_acting()
    row = arrivals(0, 1, ends={}, resets_inside=False)[0]
    draws = torch.stack([acting.act(row, torch.zeros(E, A), version=0) for _ in range(400)])
    assert draws.abs().max() <= 1 and draws.mean().abs() < 0.05 and abs(draws.std() - 3**-0.5) < 0.02


def test_version_0_is_enough_for_the_random_ticks_and_version_1_is_required_after_them():
    acting = make_acting(random_ticks=2)
    row = arrivals(0, 1, ends={}, resets_inside=False)[0]
    required = []
    for _ in range(3):
        required.append(acting.required_version)
        acting.act(row, torch.zeros(E, A), version=1)
    assert required == [0, 0, 1]


def act_with_noise(noise_std: float) -> torch.Tensor:
    """Return the actions of one tick. The last environment is an evaluation environment, which acts with the mean."""
    networks = dataclasses.replace(NETWORKS, exploration_noise=noise_std)
    settings = CollectorSettings(eval_envs=1, eval_action="mean")
    acting = ActingPolicy(SPEC, networks, settings, device=torch.device("cpu"), seed=3, random_ticks=0)
    row = arrivals(0, 1, ends={}, resets_inside=False)[0]
    return acting.act(row, torch.zeros(E, A), version=1)


def test_noise_changes_the_actions_of_training_environments_only():
    quiet, noisy = act_with_noise(0.0), act_with_noise(0.3)  # the constructor seeds both in the same way
    assert (quiet == noisy).all(1).tolist() == [False, False, False, True]
    assert noisy.abs().max() <= 1


def test_after_a_reset_inside_the_step_the_policy_acts_with_a_fresh_belief(monkeypatch):
    rows = arrivals(1, 5, ends={0: 4}, resets_inside=True)
    _, beliefs = play(make_acting(), rows, monkeypatch)
    assert rows[4].acting_obs is not None
    every, none = torch.ones(E, dtype=torch.bool), torch.zeros(E, dtype=torch.bool)
    start = dataclasses.replace(rows[4], obs=rows[4].acting_obs, is_first=every, is_last=none, acting_obs=None)
    _, (fresh,) = play(make_acting(), [start], monkeypatch)
    torch.testing.assert_close(beliefs[-1].deter[0], fresh.deter[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(beliefs[-1].deter[1], fresh.deter[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eval_action", ["mode", "mean"])
def test_a_simulator_that_seeds_torch_at_every_reset_does_not_repeat_the_noise(eval_action):
    acting = make_acting(eval_envs=1, eval_action=eval_action)
    row, taken = arrivals(0, 1, ends={}, resets_inside=False)[0], []
    for _ in range(3):
        torch.manual_seed(0)  # as an environment does in its reset
        taken.append(acting.act(row, torch.zeros(E, A), version=1).clone())
        unseen = torch.rand(1)
        torch.manual_seed(0)
        assert torch.rand(1) == unseen, "acting takes nothing from the simulator's generator"
    assert not torch.equal(taken[0], taken[1]) and not torch.equal(taken[1], taken[2])
