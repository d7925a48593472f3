"""The fast gradient step against the plain one: the same metrics, gradients and parameters, for every option."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from learner_proc import products, scan, slopes
from learner_proc.gradient_step import GradientStep
from learner_proc.plain_step import PlainStep
from shared import metrics
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.stream import ObsSpec, StreamSpec

B, L, A = 3, 5, 2
VECTOR, PIXELS = {"policy": ObsSpec((4,), "float32")}, {"pixels": ObsSpec((64, 64, 3), "uint8")}
CPU = torch.device("cpu")
V1: dict[str, Any] = {}
EVERYTHING: dict[str, Any] = {
    "continue_head": True,
    "symlog_obs": True,
    "kl_balance": 0.8,
    "free_nats": 0.5,
    "free_nats_per": "step",
    "reward_scale": 3.0,
    "imagination_starts": 6,
    "entropy_scale": 0.1,
    "slow_critic_decay": 0.9,
    "return_norm": "percentile",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "v1": V1,
    "everything": EVERYTHING,
    "continue head": {"continue_head": True, "continue_scale": 3.0},
    "free nats reached": {"free_nats": 100.0},
    "free nats of every step": {"free_nats": 0.3, "free_nats_per": "step", "kl_scale": 0.5},
    "kl balancing": {"free_nats": 0.0, "kl_balance": 0.8},
    "entropy bonus": {"entropy_scale": 0.1},
    "reinforce": {"actor_gradient": "reinforce"},
    "reinforce, everything": EVERYTHING | {"actor_gradient": "reinforce"},
    "mixed gradients, everything": EVERYTHING | {"actor_gradient": "mix"},
    "percentile returns": {"return_norm": "percentile", "reward_scale": 20.0},
    "slow critic": {"slow_critic_decay": 0.9},
    "some starts": {"imagination_starts": 6},
    "clipped gradients": {"grad_clip": 0.05, "adam_eps": 1e-3},
    "long discount": {"gamma": 0.999, "lmbda": 0.5, "imagination_horizon": 7},
    "other networks": {"activation": "silu", "normalize_obs": False, "init_std": 5.0},
}
NETWORKS = set(NetworkSettings.__dataclass_fields__)


def settings_of(options: dict[str, Any], *, compiled: bool = False) -> Settings:
    networks = {"state_dim": 3, "rssm_hidden_dim": 6, "hidden_dim": 8, "encoder_channels": 2, "init_std": 1.0}
    optimization = {"autocast": "false", "imagination_horizon": 4, "compile": CompileSettings(enabled=compiled)}
    return Settings(
        networks=NetworkSettings(**networks | {k: v for k, v in options.items() if k in NETWORKS}),
        optimization=OptimizationSettings(**optimization | {k: v for k, v in options.items() if k not in NETWORKS}),
    )


def pair(obs: dict[str, ObsSpec], settings: Settings) -> tuple[GradientStep, PlainStep]:
    """Both steps from the same seed, with biases that are not zero, so that a forgotten one shows."""
    spec, steps = StreamSpec(1, obs, A), []
    for kind in (GradientStep, PlainStep):
        torch.manual_seed(0)
        steps.append(kind(spec, settings, device=CPU))
        for module in (steps[-1].world_model, steps[-1].policy.actor, steps[-1].critic):
            for param in module.parameters():
                with torch.no_grad():
                    param.add_(0.1 * torch.randn_like(param))
    return steps[0], steps[1]


def batch_of(obs: dict[str, ObsSpec]) -> TensorDict:
    torch.manual_seed(1)
    entries = {name: torch.randn(B, L, *entry.shape) for name, entry in obs.items() if not entry.is_image}
    for name, entry in obs.items():
        if entry.is_image:
            entries[name] = torch.randint(0, 256, (B, L, *entry.shape), dtype=torch.uint8)
    flags = {name: torch.rand(B, L) < 0.3 for name in ("is_first", "is_last", "is_terminal")}
    fields = {"action": torch.rand(B, L, A) * 2 - 1, "reward": torch.randn(B, L), **flags}
    return TensorDict({"obs": TensorDict(entries, [B, L]), **fields}, [B, L])


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """Equal but for float32 rounding: relative to each number, or to the largest number of the tensor."""
    atol = 1e-5 * float(expected.abs().max()) + 1e-7
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=atol, msg=lambda text: f"{what}: {text}")


def compare(obs: dict[str, ObsSpec], settings: Settings, *, num_steps: int = 3) -> None:
    """Run both steps side by side and compare everything they measure and everything they change."""
    fast, plain = pair(obs, settings)
    batch = batch_of(obs)
    vectors = {name: batch["obs", name] for name, entry in obs.items() if not entry.is_image}
    for step in (fast, plain):
        step.policy.normaliser.update(vectors)
    for index in range(num_steps):
        measured = []
        for step in (fast, plain):
            torch.manual_seed(index)
            measured.append(step(batch).to_host())
        assert measured[0].keys() == measured[1].keys()
        for metric, value in measured[1].items():
            assert measured[0][metric] == pytest.approx(value, rel=2e-4, abs=1e-5), (index, metric)
        # Adam's first moments are averages of the gradients, so equal moments at every step mean equal gradients
        state = fast.state_dict()
        for name, adam in zip(("model", "actor", "value"), plain.optimisers, strict=True):
            for number, (mean, square) in enumerate(zip(adam.means, adam.squares, strict=True)):
                assert_near(state[f"adam_{name}"][f"{number}.exp_avg"], mean, (index, name, number))
                assert_near(state[f"adam_{name}"][f"{number}.exp_avg_sq"], square, (index, name, number))
    pairs = {
        "world model": (fast.world_model, plain.world_model),
        "actor": (fast.policy.actor, plain.policy.actor),
        "critic": (fast.critic, plain.critic),
    }
    for name, (mine, other) in pairs.items():
        for (key, found), expected in zip(mine.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, at=(name, key): f"{at}: {m}"
            )
    if settings.optimization.slow_critic_decay is not None:
        for key, expected in plain.slow_critic.state_dict().items():
            torch.testing.assert_close(fast.state_dict()["slow_critic"][key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_fast_step_computes_what_the_plain_step_computes(options):
    compare(VECTOR, settings_of(options))


@pytest.mark.parametrize("options", [V1, EVERYTHING], ids=["v1", "everything"])
@pytest.mark.parametrize("obs", [PIXELS, VECTOR | PIXELS], ids=["pixels", "vector and pixels"])
def test_the_fast_step_computes_what_the_plain_step_computes_from_pixels(obs, options):
    compare(obs, settings_of(options))


@pytest.mark.parametrize("options", [V1, EVERYTHING], ids=["v1", "everything"])
@pytest.mark.parametrize("bias_in_product", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_every_form_of_the_fast_step_computes_what_the_plain_step_computes(options, bias_in_product, monkeypatch):
    """Large batches are computed in groups of steps and in blocks of rows, and a GPU adds biases differently."""
    for module, name, value in ((products, "CACHED_ROWS", 3), (slopes, "CACHED_ROWS", 3)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(scan, "STEPS_PER_CALL", 2)
    monkeypatch.setattr(products, "splits_products", lambda x: bias_in_product)
    compare(VECTOR, settings_of(options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [V1, EVERYTHING], ids=["v1", "everything"])
def test_a_step_compiled_by_inductor_computes_what_the_plain_step_computes(options):
    torch._dynamo.reset()
    compare(VECTOR | PIXELS, settings_of(options, compiled=True))


@pytest.mark.parametrize("entry", ["reward", ("obs", "policy")], ids=["reward", "observation"])
def test_both_steps_skip_an_update_whose_gradients_are_not_finite(entry):
    settings = settings_of({"continue_head": True, "slow_critic_decay": 0.9})
    fast, plain = pair(VECTOR, settings)
    bad = batch_of(VECTOR)
    bad[entry][0, 1] = torch.nan
    skipped = []
    for step in (fast, plain):
        torch.manual_seed(0)
        skipped.append(step(bad).to_host()[metrics.SKIPPED])
    assert skipped == [1.0, 1.0]
    for name, part in (("world_model", plain.world_model), ("actor", plain.policy.actor), ("critic", plain.critic)):
        for key, expected in part.state_dict().items():
            torch.testing.assert_close(fast.state_dict()[name][key], expected, rtol=1e-4, atol=1e-6)
