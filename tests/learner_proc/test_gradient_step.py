"""The gradient step: its parameters, its losses, its precision, and its compiled form."""

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from learner_proc.gradient_step import GradientStep
from shared import metrics
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.metrics import Metric
from shared.model.distributions import tanh_normal_entropy
from shared.stream import ObsSpec, StreamSpec

B, L, A = 3, 5, 2
VECTOR, PIXELS = {"policy": ObsSpec((4,), "float32")}, {"pixels": ObsSpec((64, 64, 3), "uint8")}
CPU = torch.device("cpu")
ROBUST: dict[str, Any] = {
    "free_nats_per": "step",
    "entropy_scale": 1e-3,
    "slow_critic_decay": 0.9,
    "return_norm": "percentile",
    "imagination_starts": 6,
}
OPTIONS = pytest.mark.parametrize("options", [{}, ROBUST], ids=["v1", "options"])


def make(obs=VECTOR, cont=False, seed: int = 0, backend=None, symlog=False, **optimization: Any) -> GradientStep:
    networks = NetworkSettings(
        state_dim=3, rssm_hidden_dim=6, hidden_dim=8, encoder_channels=2, continue_head=cont, init_std=1.0
    )
    networks.symlog_obs = symlog
    compile_settings = CompileSettings(enabled=backend is not None, backend=backend or "eager")
    defaults = {"autocast": "false", "imagination_horizon": 4, "compile": compile_settings}
    settings = Settings(networks=networks, optimization=OptimizationSettings(**defaults | optimization))
    torch.manual_seed(seed)
    return GradientStep(StreamSpec(1, obs, A), settings, device=CPU)


def make_batch(obs=VECTOR, seed=1) -> TensorDict:
    torch.manual_seed(seed)
    entries = {
        name: torch.randint(0, 256, (B, L, *entry.shape), dtype=torch.uint8)
        if entry.is_image
        else torch.randn(B, L, *entry.shape)
        for name, entry in obs.items()
    }
    flags = {name: torch.rand(B, L) < 0.3 for name in ("is_first", "is_last", "is_terminal")}
    fields = {"action": torch.rand(B, L, A) * 2 - 1, "reward": torch.randn(B, L), **flags}
    return TensorDict({"obs": TensorDict(entries, [B, L]), **fields}, [B, L])


def run(
    step: GradientStep, num_steps: int, batch: TensorDict | None = None, seed: int = 7
) -> list[dict[Metric, float]]:
    torch.manual_seed(seed)
    fixed = make_batch() if batch is None else batch
    torch.manual_seed(seed)
    return [step(fixed).to_host() for _ in range(num_steps)]


def stacked(steps: list[dict[Metric, float]]) -> torch.Tensor:
    return torch.tensor([list(numbers.values()) for numbers in steps])


def assert_same(state: dict, other: dict, groups: tuple[str, ...] | None = None) -> None:
    for group in groups or tuple(state):
        for name, tensor in state[group].items():
            assert torch.equal(tensor, other[group][name]), (group, name)


def assert_close(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    for group in state:
        torch.testing.assert_close(state[group], other[group], rtol=1e-3, atol=1e-3)


def assert_moved(state: dict, other: dict, groups: tuple[str, ...]) -> None:
    for group in groups:
        assert any(not torch.equal(tensor, other[group][name]) for name, tensor in state[group].items()), group


def counts(obs: dict, action_dim: int, **networks) -> dict[str, int]:
    settings = Settings(networks=NetworkSettings(**networks))
    settings.optimization.compile.enabled = False
    return GradientStep(StreamSpec(1, obs, action_dim), settings, device=CPU).parameter_counts()


def test_parameter_counts_from_pixels_are_the_published_ones():
    expected = {"encoder": 690_144, "decoder": 3_795_555, "rssm": 557_920, "reward": 253_201, "model": 5_296_820}
    assert counts(PIXELS, 6) == expected | {"actor": 578_412, "critic": 413_601}


def test_parameter_counts_from_vectors_are_those_worked_out_by_hand():
    square = 400 * 400 + 400
    encoder = 48 * 400 + 400 + 2 * square
    decoder = 230 * 400 + 400 + 2 * square + 400 * 48 + 48
    rssm = (30 + 12) * 200 + 200 + 241_200 + 2 * (200 * 60 + 60) + 200 * 200 + 200 + (200 + 400) * 200 + 200
    actor = 230 * 400 + 400 + 3 * square + 400 * 24 + 24
    parts = {"encoder": encoder, "decoder": decoder, "rssm": rssm, "reward": 253_201, "cont": 413_601}
    found = counts({"policy": ObsSpec((48,), "float32")}, 12, continue_head=True)
    assert found == parts | {"model": sum(parts.values()), "actor": actor, "critic": 413_601}
    assert (encoder, decoder, rssm, actor) == (340_400, 432_448, 434_320, 583_224)


def test_the_gru_has_its_published_size():
    settings = Settings()
    settings.optimization.compile.enabled = False
    step = GradientStep(StreamSpec(1, VECTOR, A), settings, device=CPU)
    assert sum(p.numel() for p in step.policy.rssm.gru.parameters()) == 241_200


def test_each_parameter_has_exactly_one_optimiser():
    step = make(cont=True)
    params = {param for module in (step.policy, step.world_model, step.critic) for param in module.parameters()}
    groups = (step.state_dict()[f"adam_{name}"] for name in ("model", "actor", "value"))
    moments = [tensor for group in groups for name, tensor in group.items() if name.endswith("exp_avg")]
    assert sorted(tuple(m.shape) for m in moments) == sorted(tuple(param.shape) for param in params)


def test_gradients_in_bfloat16_have_the_direction_of_those_in_float32():
    moments = {}
    for autocast in ("false", "bfloat16"):
        step = make(cont=True, autocast=autocast)
        run(step, 1)
        moments[autocast] = step.state_dict()
    for group in ("adam_model", "adam_actor", "adam_value"):
        # after one step Adam's first moment is a tenth of the gradient
        rough, exact = (
            torch.cat([value.flatten() for name, value in state[group].items() if name.endswith("exp_avg")])
            for state in (moments["bfloat16"], moments["false"])
        )
        assert F.cosine_similarity(rough, exact, dim=0) > 0.99, group


@pytest.mark.parametrize(("moving", "still"), [("world_model_lr", ("actor", "critic")), ("value_lr", ("actor",))])
def test_all_three_losses_belong_to_the_parameters_before_the_step(moving, still):
    rates: list[dict[str, Any]] = [{moving: 0.0}, {moving: 0.1}]
    slow, fast = (make(**rate) for rate in rates)
    run(slow, 1)
    run(fast, 1)
    assert_same(slow.state_dict(), fast.state_dict(), still)
    run(slow, 1, seed=8)
    run(fast, 1, seed=8)
    assert_moved(slow.state_dict(), fast.state_dict(), still)  # the second step starts from other parameters


def test_a_step_returns_one_detached_float32_number_per_metric():
    numbers = make(cont=True)(make_batch())
    values = numbers.values
    assert values.shape == (len(numbers.metrics),) and values.dtype == torch.float32 and not values.requires_grad
    assert len(set(numbers.metrics)) == len(numbers.metrics) and torch.isfinite(values).all()
    value = numbers.to_host()
    kl = max(value[metrics.KL], 1.0)
    total = value[metrics.LOSS_OBS] + value[metrics.LOSS_REWARD] + 10 * value[metrics.LOSS_CONT] + kl
    assert value[metrics.LOSS_MODEL] == pytest.approx(total, rel=1e-5)
    assert 0.5 < value[metrics.ACTOR_STD] < 1.5
    assert value[metrics.SKIPPED] == 0.0 and value[metrics.LOSS_CONT] > 0.0


class NoSync(TorchDispatchMode):
    """Fail on every operation that makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}, func
        return func(*args, **kwargs or {})


@OPTIONS
@pytest.mark.parametrize("autocast", ["false", "bfloat16", "float16"])
def test_a_step_does_not_synchronise_with_the_device(autocast, options):
    step = make(VECTOR | PIXELS, cont=True, symlog=bool(options), autocast=autocast, **options)
    batch = make_batch(VECTOR | PIXELS)
    with NoSync():
        step(batch)
        step.observe_statistics({"policy": torch.randn(3, 2, 4)})
    with pytest.raises(AssertionError), NoSync():
        torch.ones(()).item()


@OPTIONS
def test_a_step_on_nan_observations_leaves_everything_bit_identical(options):
    # Use all starts: a random subset may leave out the window that is not finite, and then actor and critic learn.
    options = options | {"imagination_starts": None}
    step, bad = make(cont=True, **options), make_batch()
    run(step, 2)
    before = step.state_dict()
    bad["obs", "policy"][1, 2] = torch.nan
    (numbers,) = run(step, 1, bad)
    assert numbers[metrics.SKIPPED] == 1.0
    assert_same(before, step.state_dict())
    untouched = make(cont=True, **options)
    run(untouched, 2)
    assert_same(before, untouched.state_dict())
    run(step, 1)
    run(untouched, 1)
    assert_same(step.state_dict(), untouched.state_dict())


def test_a_model_gradient_that_is_not_finite_skips_the_model_alone():
    step, bad = make(), make_batch()
    before = step.state_dict()
    bad["reward"][0, 0] = torch.inf
    (numbers,) = run(step, 1, bad)
    assert numbers[metrics.SKIPPED] == 1.0
    assert_same(before, step.state_dict(), ("world_model", "adam_model"))
    assert_moved(before, step.state_dict(), ("actor", "critic", "adam_actor", "adam_value"))


@OPTIONS
@pytest.mark.parametrize("autocast", ["false", "float16"])
def test_steps_after_a_load_equal_steps_without_and_no_address_changes(autocast, options):
    step, other = (make(cont=True, autocast=autocast, seed=seed, **options) for seed in (0, 5))
    step.observe_statistics({"policy": torch.randn(20, 1, 4) * 3})
    run(step, 3)
    run(other, 1)
    saved = step.state_dict()
    addresses = [t.data_ptr() for tensors in other.tensors().values() for t in tensors.values()]
    other.load_state_dict(saved)
    assert addresses == [t.data_ptr() for tensors in other.tensors().values() for t in tensors.values()]
    ours, theirs = run(step, 3, seed=9), run(other, 3, seed=9)
    assert torch.equal(stacked(ours), stacked(theirs))
    assert_same(step.state_dict(), other.state_dict())
    assert_moved(saved, step.state_dict(), ("world_model", "actor", "critic"))  # later steps do not change a snapshot


def test_a_snapshot_of_other_networks_is_refused_and_nothing_is_copied():
    step = make()
    before, foreign = step.state_dict(), copy.deepcopy(make(seed=4).state_dict())
    foreign["critic"]["layers.0.weight"] = torch.zeros(8, 99)
    with pytest.raises(ValueError, match=r"critic/layers\.0\.weight has shape \(8, 99\); expected \(8, 9\)"):
        step.load_state_dict(foreign)
    assert_same(before, step.state_dict())


def test_a_snapshot_with_a_tensor_too_few_or_too_many_is_refused_with_the_tensors_name():
    step = make()
    fewer, more = copy.deepcopy(step.state_dict()), copy.deepcopy(step.state_dict())
    del fewer["critic"]["layers.0.weight"]
    more["critic"]["extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"layers\.0\.weight is missing in the checkpoint; expected shape \(8, 9\)"):
        step.load_state_dict(fewer)
    with pytest.raises(ValueError, match=r"critic/extra is not part of this learner; expected a checkpoint without it"):
        step.load_state_dict(more)


def test_a_run_may_resume_in_another_precision():
    half, full = make(autocast="float16"), make(autocast="false", seed=4)
    full.load_state_dict(half.state_dict())
    assert_same(full.state_dict(), {k: v for k, v in half.state_dict().items() if not k.startswith("loss_scale_")})
    half.load_state_dict(full.state_dict())
    assert half.state_dict()["loss_scale_model"]["scale"] == 2.0**16


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
@pytest.mark.parametrize("obs", [VECTOR, PIXELS], ids=["vector", "pixels"])
def test_lower_precision_stays_close_to_float32(autocast, obs):
    exact, rough = (
        make(obs, cont=True, autocast=name, world_model_lr=0.0, actor_lr=0.0, value_lr=0.0)
        for name in ("false", autocast)
    )
    # After twelve steps the loss scale of float16 is low enough.
    expected, found = (run(step, 12, make_batch(obs))[-1] for step in (exact, rough))
    assert found[metrics.SKIPPED] == 0.0
    torch.testing.assert_close(stacked([found]), stacked([expected]), rtol=0.1, atol=0.05)
    assert all(t.dtype == torch.float32 for tensors in rough.state_dict().values() for t in tensors.values())


def test_the_clipped_metrics_are_one_for_norms_above_the_limit():
    step = make(grad_clip=0.75)
    (numbers,) = run(step, 1)
    norms = [numbers[m] for m in (metrics.GRAD_NORM_MODEL, metrics.GRAD_NORM_ACTOR, metrics.GRAD_NORM_VALUE)]
    clipped = [numbers[m] for m in (metrics.CLIPPED_MODEL, metrics.CLIPPED_ACTOR, metrics.CLIPPED_VALUE)]
    assert clipped == [float(norm > 0.75) for norm in norms] and set(clipped) == {0.0, 1.0}, norms


@pytest.mark.parametrize(("free_nats", "share"), [(0.0, 0.0), (100.0, 1.0)])
def test_kl_free_is_one_if_the_kl_has_no_gradient(free_nats, share):
    step = make(free_nats=free_nats)
    assert run(step, 1)[0][metrics.KL_FREE] == share


def test_actor_entropy_is_that_of_actions_between_minus_one_and_one():
    step = make(actor_lr=0.0)
    found = torch.tensor([numbers[metrics.ACTOR_ENTROPY] for numbers in run(step, 10)]).mean()
    torch.manual_seed(0)
    mean, std = torch.zeros(100_000, A), torch.full((100_000, A), 1.0)  # init_std, and means near zero
    expected = tanh_normal_entropy(mean, std, torch.randn(100_000, A)).mean()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.15)
    assert expected < A * 0.6931472  # ln 2 for a uniform action


def test_statistics_are_used_in_acting_and_learning_and_pixels_need_none():
    step = make()
    step.observe_statistics({"policy": torch.tensor([[[4.0] * 4], [[6.0] * 4]])})
    assert step.policy.normaliser({"policy": torch.full((1, 4), 7.0)})["policy"].tolist() == [[2.0] * 4]
    far = make_batch()
    far["obs", "policy"].mul_(1000).add_(5000)
    losses = []
    for rows in (torch.zeros(0, 1, 4), far["obs", "policy"]):
        step = make()
        if len(rows):
            step.observe_statistics({"policy": rows})
        losses.append(run(step, 1, far)[0][metrics.LOSS_OBS])
    assert losses[0] > 100.0 and losses[1] < 10.0  # four dimensions clipped at 10; four with unit variance
    assert not make(PIXELS).state_dict()["normaliser"]
    make(PIXELS).observe_statistics({"pixels": torch.zeros(2, 1, 64, 64, 3, dtype=torch.uint8)})


def test_the_world_model_learns_to_predict_one_batch():
    step = make(world_model_lr=1e-2, value_lr=0.0, actor_lr=0.0, free_nats=0.0)
    numbers = run(step, 100)
    for metric in (metrics.LOSS_OBS, metrics.LOSS_REWARD):
        first, last = (torch.tensor([n[metric] for n in part]).mean() for part in (numbers[:1], numbers[-10:]))
        assert last < first - 0.1, (metric, first, last)


def test_the_critic_learns_the_returns():
    step = make(world_model_lr=0.0, actor_lr=0.0, value_lr=1e-2, gamma=0.5)
    with torch.no_grad():
        list(step.critic.parameters())[-1].fill_(3.0)  # too high: with gamma 0.5 the returns are lower
    numbers = run(step, 60)
    floor = (1 + 0.5 + 0.25) / 3 * 0.9189385  # half log two pi, weighted by 1, gamma, gamma^2
    assert numbers[0][metrics.LOSS_VALUE] > floor + 0.3
    assert numbers[-1][metrics.LOSS_VALUE] < floor + 0.05


def test_the_actor_increases_the_imagined_return():
    step = make(actor_lr=1e-2, world_model_lr=0.0, value_lr=0.0)
    numbers = run(step, 60)
    first, last = (
        torch.tensor([n[metrics.IMAGINED_RETURN] for n in part]).mean() for part in (numbers[:5], numbers[-5:])
    )
    assert last > first + 0.02, (first, last)


def compare_with_eager(backend: str, **options: Any) -> None:
    torch._dynamo.reset()
    eager, compiled = make(cont=True, **options), make(cont=True, backend=backend, **options)
    run(compiled, 1)
    compiled.load_state_dict(eager.state_dict())
    with torch.compiler.set_stance("fail_on_recompile"):
        found = run(compiled, 3)
    torch.testing.assert_close(stacked(found), stacked(run(eager, 3)), rtol=1e-3, atol=1e-3)

    assert_close(compiled.state_dict(), eager.state_dict())


@OPTIONS
def test_compiled_steps_equal_eager_ones_and_compile_once(options):
    compare_with_eager("aot_eager", **options)


@pytest.mark.slow
@OPTIONS
def test_steps_compiled_by_inductor_equal_eager_ones_and_leave_no_thread_behind(options):
    threads = threading.active_count()
    compare_with_eager("inductor", **options)
    assert threading.active_count() == threads
