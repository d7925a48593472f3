"""Losses against torch.distributions, and the laws of windows that cross episodes."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from learner_proc.world_model import WorldModel
from shared.config import NetworkSettings, OptimizationSettings, Settings
from shared.model.policy import Policy
from shared.model.rssm import Belief, Posterior, feat
from shared.stream import ObsSpec, StreamSpec

B, L, A, S, D = 3, 6, 2, 3, 5
VECTOR, PIXELS = {"policy": ObsSpec((4,), "float32")}, {"pixels": ObsSpec((64, 64, 1), "uint8")}


def make(obs=VECTOR, cont=False, **optimization) -> WorldModel:
    torch.manual_seed(0)
    networks = NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8, encoder_channels=2, continue_head=cont)
    settings = Settings(networks=networks, optimization=OptimizationSettings(**optimization))
    spec = StreamSpec(1, obs, A)
    return WorldModel(spec, settings, Policy(spec, networks))


def window(obs=VECTOR) -> dict:
    torch.manual_seed(1)
    entries = {
        name: torch.randint(0, 256, (B, L, *entry.shape), dtype=torch.uint8)
        if entry.is_image
        else torch.randn(B, L, *entry.shape)
        for name, entry in obs.items()
    }
    first = torch.zeros(B, L, dtype=torch.bool)
    return {
        "obs": entries,
        "action": torch.rand(B, L, A) * 2 - 1,
        "is_first": first,
        "noise": torch.randn(L, B, S),
        "reward": torch.randn(B, L),
        "is_terminal": first.clone(),
    }


def observe(model: WorldModel, w: dict) -> Posterior:
    return model.observe(w["obs"], w["action"], w["is_first"], w["noise"])


def loss(model: WorldModel, w: dict):
    return model.loss(w["obs"], observe(model, w), w["reward"], w["is_terminal"])


def cut(w: dict, span: slice) -> dict:
    part = {k: v[:, span] for k, v in w.items() if isinstance(v, torch.Tensor) and k != "noise"}
    return part | {"obs": {k: v[:, span] for k, v in w["obs"].items()}, "noise": w["noise"][span]}


def test_splitting_a_window_at_an_is_first_leaves_every_belief_as_it_was():
    model, w = make(), window()
    w["is_first"][:, 3] = True
    whole = observe(model, w)
    halves = [observe(model, cut(w, span)) for span in (slice(0, 3), slice(3, L))]
    for index in (0, 1):
        joined = torch.cat([half.belief[index] for half in halves], 1)
        torch.testing.assert_close(whole.belief[index], joined, rtol=1e-5, atol=1e-6)


def test_nothing_before_an_is_first_influences_the_rows_after_it():
    model, w = make(), window()
    w["is_first"][:, 3] = True
    w["obs"]["policy"].requires_grad_()
    w["action"].requires_grad_()
    deter, stoch = observe(model, w).belief
    after = deter[:, 3:].square().sum() + stoch[:, 3:].square().sum()
    grad_obs, grad_action = torch.autograd.grad(after, [w["obs"]["policy"], w["action"]])
    assert not grad_obs[:, :3].any() and not grad_action[:, :4].any()  # nor does the action of the reset itself
    assert grad_obs[:, 3:].any(-1).all() and grad_action[:, 4:].any(-1).all()
    shuffled = window()
    shuffled["is_first"][:, 3] = True
    shuffled["obs"]["policy"][:, :3] = shuffled["obs"]["policy"][:, :3].flip(1) * 100
    shuffled["action"][:, :4] = 0.77
    for before, now in zip(observe(model, w).belief, observe(model, shuffled).belief, strict=True):
        assert torch.equal(before[:, 3:], now[:, 3:]) and not torch.isclose(before[:, 0], now[:, 0]).all()


def test_a_window_inside_an_episode_starts_from_a_zero_belief_and_its_recorded_action():
    model, w = make(), window()
    deter = observe(model, w).belief.deter
    blank = model.rssm.initial(B)
    torch.testing.assert_close(deter[:, 0], model.rssm.transition(blank, w["action"][:, 0]), rtol=1e-6, atol=1e-7)


def test_observing_recorded_rows_gives_the_beliefs_of_acting_if_the_executed_action_is_stored(monkeypatch):
    spec = StreamSpec(B, VECTOR, A)
    model = make()
    policy = Policy(spec, NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8))
    policy.encoder, policy.rssm = model.encoder, model.rssm
    w = window()
    w["is_first"][:, 0], w["is_first"][1, 3] = True, True
    w["noise"].zero_()  # acting draws other noise, so both sides are compared without any
    noise = {A: 0.5}
    monkeypatch.setattr(
        "shared.model.policy.normal_like", lambda x, generator: torch.full_like(x, noise.get(x.shape[-1], 0.0))
    )
    belief, action, acted = policy.initial_belief(B), torch.zeros(B, A), []
    for t in range(L):
        w["action"][:, t] = action.masked_fill(w["is_first"][:, t, None], 0.0)
        action, belief = policy.explore(
            {"policy": w["obs"]["policy"][:, t]},
            belief,
            action,
            w["is_first"][:, t],
            noise_std=0.3,
        )
        acted.append(belief)
    scanned = observe(model, w).belief
    for index in (0, 1):
        stacked = torch.stack([belief[index] for belief in acted], 1)
        torch.testing.assert_close(scanned[index], stacked, rtol=1e-5, atol=1e-6)


def test_a_reward_is_predicted_from_the_observation_it_arrived_with():
    model, w = make(), window()
    w["reward"].requires_grad_()
    posterior = observe(model, w)
    total = model.loss(w["obs"], posterior, w["reward"], w["is_terminal"]).total
    (grad,) = torch.autograd.grad(total, w["reward"], retain_graph=True)
    predicted = model.reward(feat(posterior.belief))
    torch.testing.assert_close(grad, (w["reward"] - predicted).detach() / (B * L), rtol=1e-4, atol=1e-6)
    w["obs"]["policy"].requires_grad_()
    (grad,) = torch.autograd.grad(model.reward(feat(observe(model, w).belief))[:, 2].sum(), w["obs"]["policy"])
    assert grad[:, 2].any(-1).all() and not grad[:, 3:].any()  # it depends on this step and on no later one


def oracle_loss(model: WorldModel, w: dict, posterior: Posterior, free_nats: float) -> dict:
    settings, features = model.optimization, feat(posterior.belief)
    log_obs = torch.zeros(B, L)
    for name, decoder in model.decoder.entries.items():
        x = w["obs"][name]
        target = x.float() / 255 - 0.5 if x.dtype == torch.uint8 else x
        log_obs = log_obs + Independent(Normal(decoder(features), 1.0), target.dim() - 2).log_prob(target)
    reward = Normal(model.reward(features), 1.0).log_prob(w["reward"] * settings.reward_scale)
    prior = Independent(Normal(*model.rssm.prior(posterior.belief.deter)), 1)
    kl = kl_divergence(Independent(Normal(posterior.mean, posterior.std), 1), prior).mean()
    total = settings.kl_scale * kl.clamp(min=free_nats) - log_obs.mean() - reward.mean()
    parts = {"obs": -log_obs.mean(), "reward": -reward.mean(), "kl": kl}
    if model.cont is not None:
        target = settings.gamma * (1 - w["is_terminal"].float())
        log_cont = Bernoulli(logits=model.cont(features), validate_args=False).log_prob(target).mean()
        total, parts["cont"] = total - settings.continue_scale * log_cont, -log_cont
    return parts | {"total": total}


@pytest.mark.parametrize("obs", [VECTOR, PIXELS, VECTOR | PIXELS], ids=["vector", "pixels", "both"])
@pytest.mark.parametrize("cont", [False, True])
def test_the_loss_is_the_negative_log_likelihood_plus_kl_of_the_paper(obs, cont):
    model = make(obs, cont, free_nats=0.05, kl_scale=0.7, reward_scale=50.0, gamma=0.97, continue_scale=3.0)
    w = window(obs)
    w["is_terminal"][1, 4] = True
    posterior = observe(model, w)
    ours, oracle = (
        model.loss(w["obs"], posterior, w["reward"], w["is_terminal"]),
        oracle_loss(model, w, posterior, 0.05),
    )
    for name, expected in oracle.items():
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)


def test_the_loss_does_not_grow_with_the_number_of_windows_or_steps():
    model, w = make(free_nats=0.0), window()
    twice: dict = {k: torch.cat([v, v], 1 if k == "noise" else 0) for k, v in w.items() if k != "obs"}
    twice["obs"] = {"policy": torch.cat([w["obs"]["policy"]] * 2)}
    torch.testing.assert_close(loss(model, twice).total, loss(model, w).total, rtol=1e-5, atol=1e-5)


def test_a_perfect_decoder_has_a_loss_of_half_log_two_pi_per_dimension():
    for obs, dims in ((VECTOR, 4), (PIXELS, 64 * 64)):
        model, w = make(obs), window(obs)
        for param in model.decoder.parameters():
            torch.nn.init.zeros_(param)
        entry = next(iter(w["obs"].values()))
        entry.zero_()
        # A black pixel is 0.5 away from the grey that is predicted.
        centre = 0.25 if entry.dtype == torch.uint8 else 0.0
        expected = torch.tensor(dims * (0.9189385 + 0.5 * centre))
        torch.testing.assert_close(loss(model, w).obs, expected, rtol=1e-5, atol=1e-5)


def test_free_nats_are_three_with_pixels_and_one_without_unless_set():
    assert [make(o).free_nats for o in (VECTOR, PIXELS, VECTOR | PIXELS)] == [1.0, 3.0, 3.0]
    assert make(PIXELS, free_nats=0.0).free_nats == 0.0


def test_the_kl_has_no_gradient_below_the_free_nats_and_trains_prior_and_posterior_above():
    w = window()
    for free_nats, moves in ((100.0, False), (0.0, True)):
        model = make(free_nats=free_nats)
        posterior = observe(model, w)
        kl, loss_kl, _ = model.kl(posterior)
        assert 0.0 < kl < 100.0 and loss_kl.item() == pytest.approx(max(kl.item(), free_nats))
        for layer in (model.rssm.prior_out, model.rssm.posterior_out):
            (grad,) = torch.autograd.grad(loss_kl, layer.weight, retain_graph=True)
            assert bool(grad.any()) == moves


def two_steps_of_eight_and_no_nats(**optimization) -> tuple[WorldModel, Posterior]:
    model = make(**optimization)
    mean = torch.zeros(1, 2, S)
    deter = torch.zeros(1, 2, D)
    prior_mean, prior_std = (part.detach() for part in model.rssm.prior(deter))
    mean[0, 0] = prior_mean[0, 0] + torch.tensor([4.0, 0.0, 0.0]) * prior_std[0, 0]
    mean[0, 1] = prior_mean[0, 1]
    return model, Posterior(Belief(deter, mean), mean, prior_std)


def test_kl_balance_splits_the_gradient_and_keeps_the_value():
    posterior = observe(make(), window())
    deter, mean = posterior.belief.deter.detach(), posterior.mean.detach().requires_grad_()
    fixed = Posterior(Belief(deter, mean), mean, posterior.std.detach())
    values, grads = [], []
    for balance in (None, 0.8):
        model = make(free_nats=0.0, kl_balance=balance)
        loss_kl = model.kl(fixed)[1]
        values.append(loss_kl.item())
        grads.append(torch.autograd.grad(loss_kl, [model.rssm.prior_out.weight, mean]))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch.testing.assert_close(grads[1][0], 0.8 * grads[0][0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grads[1][1], 0.2 * grads[0][1], rtol=1e-4, atol=1e-7)


def test_time_outs_and_terminations_differ_only_in_the_continue_target():
    model, ended, timed_out = make(cont=True), window(), window()
    ended["is_terminal"][0, 2] = True
    a, b = loss(model, ended), loss(model, timed_out)
    assert torch.equal(a.obs, b.obs) and torch.equal(a.reward, b.reward) and torch.equal(a.kl, b.kl)
    assert model.cont is not None
    logit = model.cont(feat(observe(model, ended).belief))[0, 2]
    torch.testing.assert_close(a.cont - b.cont, 0.99 * logit.detach() / (B * L), rtol=1e-3, atol=1e-5)
    plain = make()
    assert torch.equal(loss(plain, ended).total, loss(plain, timed_out).total) and loss(plain, ended).cont == 0


def test_every_head_trains_rssm_and_encoder():
    model, w = make(VECTOR | PIXELS, cont=True), window(VECTOR | PIXELS)
    shared = [*model.rssm.posterior_embed.parameters(), *model.encoder.parameters()]
    features = feat(observe(model, w).belief)
    assert model.cont is not None
    for value in (model.reward(features), model.cont(features), model.decoder.nll(features, w["obs"])):
        grads = torch.autograd.grad(value.sum(), shared, retain_graph=True)
        assert all(grad.any() for grad in grads)


def test_an_image_decoder_returns_64_by_64_pixels_of_every_colour():
    for colours in (1, 3):
        model = make({"pixels": ObsSpec((64, 64, colours), "uint8")})
        assert model.decoder.entries["pixels"](torch.randn(B, L, S + D)).shape == (B, L, 64, 64, colours)


@pytest.mark.parametrize(("per", "expected", "free"), [("mean", 4.0, 0.0), ("step", 4.5, 0.5)])
@pytest.mark.parametrize("balance", [None, 0.8])
def test_free_nats_limit_the_mean_kl_or_the_kl_of_every_step(per, expected, free, balance):
    model, posterior = two_steps_of_eight_and_no_nats(free_nats=1.0, free_nats_per=per, kl_balance=balance)
    kl = model.kl(posterior)
    assert [kl.mean.item(), kl.loss.item(), kl.free.item()] == pytest.approx([4.0, expected, free], rel=1e-5)


@pytest.mark.parametrize(("per", "free"), [("mean", 1.0), ("step", 0.5)])
def test_free_nats_of_the_mean_stop_all_gradients_and_free_nats_per_step_those_of_low_steps(per, free):
    model, posterior = two_steps_of_eight_and_no_nats(free_nats=5.0, free_nats_per=per)
    mean = posterior.mean.requires_grad_()
    kl = model.kl(posterior)
    (grad,) = torch.autograd.grad(kl.loss, mean)
    assert kl.free.item() == free and not grad[0, 1].any() and bool(grad[0, 0].any()) == (per == "step")
