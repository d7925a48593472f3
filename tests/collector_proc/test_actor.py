"""Acting: scanning the recorded rows reproduces the beliefs the actor acted in."""

import torch

from collector_proc.actor import Actor
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.model.rssm import Belief
from shared.stream import ObsSpec, StreamSpec

E, A = 4, 2
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32")}, A)
NETWORKS = NetworkSettings(state_dim=4, rssm_hidden_dim=8, hidden_dim=8, init_std=1.0)


def make_actor(**collector) -> Actor:
    settings = CollectorSettings(eval_envs=1, eval_action="mean") if not collector else CollectorSettings(**collector)
    return Actor(SPEC, NETWORKS, settings, device=torch.device("cpu"), seed=3, random_ticks=0)


def flags(*envs: int) -> torch.Tensor:
    return torch.tensor([env in envs for env in range(E)])


def arrivals(seed: int, ticks: int, *, ends: dict[int, int], resets_inside: bool) -> list[Arrival]:
    """ends: environment -> tick of its is_last. Deferred resets follow one tick later; inside ones at once."""
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


def scan(actor: Actor, rows: list[Arrival], actions: list[torch.Tensor], env: int, start: int) -> Belief:
    """The world model's scan of one environment's recorded rows, noise-free means compared by their deter."""
    rssm, belief = actor.policy.rssm, actor.policy.initial_belief(1)
    for row, action in zip(rows[start:], actions[start:], strict=True):
        obs = {"policy": row.obs["policy"][env : env + 1]}
        share = rssm.embed_share(actor.policy.encoder(actor.policy.normaliser(obs)))
        noise = NOISE[: belief.stoch.shape[0]] * 0
        belief = rssm.posterior_step(
            belief, action[env : env + 1], share, row.is_first[env : env + 1, None], noise
        ).belief
    return belief


def test_evaluation_is_spread_over_the_columns():
    assert make_actor(eval_envs=2).evaluation.tolist() == [False, True, False, True]
    assert not make_actor(eval_envs=0).evaluation.any()


NOISE = torch.zeros(E, NETWORKS.state_dim)


def play(actor: Actor, rows: list[Arrival], monkeypatch) -> tuple[list[torch.Tensor], list[Belief]]:
    """Recorded actions (0 at is_first) and the beliefs acted in; the stochastic state is drawn without noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    action, recorded, beliefs = torch.zeros(E, A), [], []
    for row in rows:
        action = torch.where(row.is_first[:, None], 0.0, action)
        recorded.append(action)
        action = actor.act(row, action, version=1)
        beliefs.append(actor.belief)
    return recorded, beliefs


def test_scanning_the_recorded_rows_reproduces_the_acting_beliefs(monkeypatch):
    actor = make_actor()
    rows = arrivals(0, 9, ends={0: 4, 2: 6}, resets_inside=False)
    recorded, beliefs = play(actor, rows, monkeypatch)
    for env in range(E):
        torch.testing.assert_close(
            scan(actor, rows, recorded, env, 0).deter[0], beliefs[-1].deter[env], rtol=1e-5, atol=1e-6
        )


def test_the_same_holds_for_a_simulator_that_resets_inside_step(monkeypatch):
    actor = make_actor()
    rows = arrivals(1, 9, ends={0: 4, 2: 6}, resets_inside=True)
    recorded, beliefs = play(actor, rows, monkeypatch)
    for env in range(E):
        torch.testing.assert_close(
            scan(actor, rows, recorded, env, 0).deter[0], beliefs[-1].deter[env], rtol=1e-5, atol=1e-6
        )


def test_what_happened_before_a_reset_leaves_no_trace(monkeypatch):
    one, two = make_actor(), make_actor()
    rows = arrivals(2, 8, ends={1: 3}, resets_inside=False)
    other = arrivals(9, 8, ends={1: 3}, resets_inside=False)
    mixed = other[:4] + rows[4:]
    beliefs_one, beliefs_two = play(one, rows, monkeypatch)[1], play(two, mixed, monkeypatch)[1]
    assert torch.equal(beliefs_one[-1].deter[1], beliefs_two[-1].deter[1])
    assert not torch.equal(beliefs_one[-1].deter[0], beliefs_two[-1].deter[0])


def test_actions_are_uniform_until_weights_were_adopted_and_evaluation_columns_are_noise_free():
    actor = make_actor()
    row = arrivals(0, 1, ends={}, resets_inside=False)[0]
    draws = torch.stack([actor.act(row, torch.zeros(E, A), version=0) for _ in range(400)])
    assert draws.abs().max() <= 1 and draws.mean().abs() < 0.05 and abs(draws.std() - 3**-0.5) < 0.02
    belief = actor.belief
    repeats = []
    for _ in range(20):
        actor.belief = belief
        torch.manual_seed(0)  # the belief's own sample is drawn first, so equal seeds give equal beliefs
        repeats.append(actor.act(row, torch.zeros(E, A), version=1))
    assert all(torch.equal(r[-1], repeats[0][-1]) for r in repeats)


def test_training_actions_carry_noise_and_stay_in_range():
    actor = make_actor()
    row = arrivals(0, 1, ends={}, resets_inside=False)[0]
    belief, seen = actor.belief, []
    for _ in range(300):
        actor.belief = belief
        seen.append(actor.act(row, torch.zeros(E, A), version=1))
    stacked = torch.stack(seen)
    assert stacked.abs().max() <= 1
    assert stacked[:, 0].std() > 0.3, "sample and noise of 0.3"
