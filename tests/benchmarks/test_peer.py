"""The comparison with TorchRL: both sides compute the same losses, and every mode is timed and reported."""

import inspect

import pytest
import torch
from torch import nn
from torchrl.modules import RSSMPrior

from benchmarks import agreement, peer_torchrl
from benchmarks.step_cases import our_step, settings_for, synthetic_batch
from benchmarks.torchrl_update import MODES, RECIPE, TorchRLNetworks, TorchRLUpdate, to_torchrl

CPU = torch.device("cpu")
needs_sizes = pytest.mark.skipif(
    "action_dim" not in inspect.signature(RSSMPrior).parameters,
    reason="the RSSM takes the sizes of its layers from TorchRL 0.11 on",
)


def num_parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@needs_sizes
def test_our_copy_of_the_recipes_networks_has_the_recipes_parameter_counts():
    networks = TorchRLNetworks(RECIPE)
    counts = [num_parameters(m) for m in (networks.world_model, networks.actor_module, networks.value_module)]
    assert counts == [1_674_993, 422_824, 413_601]  # counted in the recipe, with 48 observations and 12 actions


@needs_sizes
@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "full"])
def test_with_the_same_weights_and_noise_the_model_losses_and_their_gradient_equal_torchrls(tiny):
    terms = {term["name"]: term for term in agreement.with_torchrl(device=CPU, tiny=tiny)["terms"]}
    assert set(terms) == {"reconstruction", "reward", "kl", "gradient norm"}
    for term in terms.values():
        assert term["ours"] == pytest.approx(term["other"], rel=agreement.RTOL), term
        assert term["agrees"], term


@needs_sizes
def test_with_different_noise_the_losses_differ(monkeypatch):
    theirs = agreement._their_terms
    monkeypatch.setattr(agreement, "_their_terms", lambda step, batch, noise: theirs(step, batch, -noise))
    terms = agreement.with_torchrl(device=CPU, tiny=True)["terms"]
    assert not any(term["agrees"] for term in terms), terms


def test_bfloat16_losses_stay_within_their_tolerances_of_float32():
    for term in agreement.fast_against_plain(device=CPU, compiled=False, tiny=True)["terms"]:
        assert term["agrees"], term
        assert term["ours"] != term["other"], term  # equal values would mean that nothing ran in bfloat16


@needs_sizes
def test_copied_networks_return_the_same_values():
    step = our_step(settings_for(20, tiny=True), device=CPU)
    networks = TorchRLNetworks(agreement.sizes_of(step))
    agreement.copy_weights(step, networks)
    state, belief = torch.randn(7, 4), torch.randn(7, 8)
    features = torch.cat([state, belief], -1)
    torch.testing.assert_close(networks.value(features)[:, 0], step.critic(features), rtol=1e-5, atol=1e-6)
    loc, scale = networks.actor(state, belief)
    mean, std = step.policy.actor(features)
    torch.testing.assert_close(5 * torch.tanh(loc / 5), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale, std, rtol=1e-4, atol=1e-5)


def test_the_torchrl_modes_are_eager_and_what_its_recipe_compiles():
    assert MODES == ("eager", "rssm", "losses", "rssm+losses")


@needs_sizes
def test_an_update_changes_all_three_networks_and_its_losses_are_finite():
    update = TorchRLUpdate(peer_torchrl.TINY, device=CPU)
    before = {name: [p.clone() for p in params] for name, (_, params) in update.optimizers.items()}
    losses = update(to_torchrl(synthetic_batch(20, device=CPU), peer_torchrl.TINY))
    assert all(torch.isfinite(value).all() for value in vars(losses).values())
    for name, (_, params) in update.optimizers.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], params, strict=True)), name


@needs_sizes
def test_a_run_reports_both_sides_at_every_size():
    result = peer_torchrl.run([20, 100], modes=["eager"], repetitions=2, tiny=True)
    assert [size["frames"] for size in result["sizes"]] == [20, 100]
    for size in result["sizes"]:
        assert set(size["alone"]) == {"ours eager fp32", "torchrl eager fp32", "ours eager bf16", "torchrl eager bf16"}
        assert not size["failed"]
        assert size["best"]["ours"].startswith("ours") and size["best"]["torchrl"].startswith("torchrl")
        for side in ("ours", "torchrl"):
            assert 0 < size["duel"][side]["cpu_ms_min"] <= size["duel"][side]["cpu_ms_max"]
        assert size["ratio"]["min"] <= size["ratio"]["median"] <= size["ratio"]["max"]
    names = [row["name"] for row in peer_torchrl.rows(result)]
    assert "20 frames" in names and "same weights, noise: kl" in names


@needs_sizes
def test_a_mode_that_fails_is_reported_and_the_others_are_still_measured(monkeypatch):
    class Broken(TorchRLUpdate):
        def __call__(self, batch):
            if self.precision == "bfloat16":
                raise RuntimeError("no bf16 here")
            return super().__call__(batch)

    monkeypatch.setattr(peer_torchrl, "TorchRLUpdate", Broken)
    size = peer_torchrl.run([20], modes=["eager"], repetitions=1, tiny=True)["sizes"][0]
    assert size["failed"] == {"torchrl eager bf16": "RuntimeError: no bf16 here"}
    assert size["best"]["torchrl"] == "torchrl eager fp32"
