"""Prediction errors worked out by hand in a world that moves by its actions, and what predictions may depend on."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from learner_proc.diagnostics import WINDOW_LENGTH, Diagnostics
from learner_proc.gradient_step import GradientStep
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.model.layers import Normaliser
from shared.model.rssm import Belief, Posterior, feat
from shared.stream import ObsSpec, StreamSpec

B, A = 4, 2
SPEC = StreamSpec(1, {"position": ObsSpec((A,), "float32")}, A)


class Odometer:
    """A model whose belief is the last observed position plus `pace` times the sum of the later actions.

    With a pace of 1 it is perfect.
    """

    def __init__(self, pace: float) -> None:
        self.pace = pace
        self.rssm = SimpleNamespace(stoch_dim=1, prior_step=self.prior_step)

    def observe(self, obs: dict, action, is_first, noise) -> Posterior:
        deter = obs["position"]
        stoch = torch.zeros(*deter.shape[:2], 1)
        return Posterior(Belief(deter, stoch), stoch, stoch)

    def prior_step(self, belief: Belief, action, noise) -> Belief:
        return Belief(belief.deter + self.pace * action, belief.stoch)

    def decoder(self, features):
        return {"position": features[..., 1:]}


def odometry(length: int) -> TensorDict:
    """Return windows in which the position is the sum of the actions. The action before row t is (t, 0.5)."""
    tick = torch.arange(length, dtype=torch.float32)
    action = torch.stack([tick, torch.full_like(tick, 0.5)], -1).expand(B, length, A).clone()
    first = torch.zeros(B, length, dtype=torch.bool)
    fields = {"action": action, "reward": torch.zeros(B, length), "is_first": first, "is_terminal": first.clone()}
    return TensorDict({"obs": {"position": action.cumsum(1)}, **fields}, [B, length])


def odometer(pace: float, length: int) -> Diagnostics:
    return Diagnostics(SPEC, cast(Any, Odometer(pace)), Normaliser(SPEC, enabled=False), length=length)


def errors(diagnostics: Diagnostics, batch: TensorDict) -> dict[str, float]:
    return {metric.name: value for metric, value in diagnostics(batch).to_host().items()}


@pytest.mark.parametrize(
    ("length", "context", "horizons"),
    [(2, 1, ()), (9, 3, (5,)), (16, 5, (5,)), (20, 5, (5, 15)), (54, 5, (5, 15)), (WINDOW_LENGTH, 5, (5, 15, 50))],
)
def test_the_context_is_a_third_of_a_window_up_to_five_rows_and_every_horizon_fits(length, context, horizons):
    diagnostics = odometer(1.0, length)
    assert (diagnostics.context, diagnostics.horizons) == (context, horizons)
    assert diagnostics(odometry(length)).metrics == diagnostics.metrics and len(diagnostics.metrics) == 2 * len(
        horizons
    )


def test_a_perfect_model_has_no_error_and_a_repetition_has_the_squared_distance_as_error():
    found = errors(odometer(1.0, WINDOW_LENGTH), odometry(WINDOW_LENGTH))
    for horizon in (5, 15, 50):
        moved = sum(range(5, 5 + horizon))  # the rows after the context: 5, 6, ...
        assert found[f"open_loop_position_{horizon}"] == pytest.approx(0.0, abs=1e-3)
        assert found[f"repeat_last_position_{horizon}"] == pytest.approx((moved**2 + (0.5 * horizon) ** 2) / 2)


def test_a_model_with_half_the_speed_has_a_quarter_of_the_squared_error():
    found = errors(odometer(0.5, 20), odometry(20))
    for horizon in (5, 15):
        ratio = found[f"open_loop_position_{horizon}"] / found[f"repeat_last_position_{horizon}"]
        assert ratio == pytest.approx(0.25, rel=1e-5)


def test_windows_in_which_an_episode_begins_up_to_the_predicted_row_do_not_count():
    batch, diagnostics = odometry(20), odometer(1.0, 20)
    clean = errors(diagnostics, batch)
    for window, row in ((0, 1), (1, 9), (2, 10), (3, 0)):  # horizon 5 predicts row 9, horizon 15 row 19
        batch["is_first"][window, row] = True
    for window in (0, 1):
        batch["obs", "position"][window, 9] = 1e6
    for window in (0, 1, 2):
        batch["obs", "position"][window, 19] = torch.nan
    assert errors(diagnostics, batch) == clean
    batch["is_first"][3, 19] = True
    found = errors(diagnostics, batch)
    assert math.isnan(found["open_loop_position_15"]) and math.isnan(found["repeat_last_position_15"])
    assert found["open_loop_position_5"] == clean["open_loop_position_5"]


def test_a_rollout_has_the_windows_in_which_the_fewest_episodes_begin():
    batch, diagnostics = odometry(20), odometer(1.0, 20)
    batch["obs", "position"].add_(1000.0 * torch.arange(B)[:, None, None])
    batch["is_first"][0, 7] = batch["is_first"][1, 0] = batch["is_first"][3, 3] = batch["is_first"][3, 5] = True
    shown = diagnostics.rollout(batch, num_windows=3)
    windows = (shown.observed["position"][:, 0, 1] / 1000).round().tolist()
    assert sorted(windows[:2]) == [1.0, 2.0] and windows[2] == 0.0
    assert shown.crosses.tolist() == [False, False, True] and shown.context == 5
    torch.testing.assert_close(shown.predicted["position"], shown.observed["position"], rtol=1e-6, atol=1e-3)


def make(obs: dict[str, ObsSpec], length: int) -> tuple[GradientStep, Diagnostics, TensorDict]:
    torch.manual_seed(0)
    networks = NetworkSettings(state_dim=4, rssm_hidden_dim=16, hidden_dim=16, encoder_channels=2, init_std=1.0)
    optimization = OptimizationSettings(
        autocast="false", imagination_horizon=2, free_nats=0.0, world_model_lr=5e-3, compile=CompileSettings(False)
    )
    spec = StreamSpec(1, obs, A)
    step = GradientStep(spec, Settings(networks=networks, optimization=optimization), device=torch.device("cpu"))
    flags = {name: torch.zeros(B, length, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    entries = {name: torch.randn(B, length, *entry.shape) for name, entry in obs.items() if not entry.is_image}
    entries |= {
        name: torch.randint(0, 256, (B, length, *entry.shape), dtype=torch.uint8)
        for name, entry in obs.items()
        if entry.is_image
    }
    fields = {"action": torch.rand(B, length, A) * 2 - 1, "reward": torch.zeros(B, length), **flags}
    batch = TensorDict({"obs": TensorDict(entries, [B, length]), **fields}, [B, length])
    return step, Diagnostics(spec, step.world_model, step.policy.normaliser, length=length), batch


def test_predictions_depend_on_the_context_and_the_actions_and_no_later_observation():
    _, diagnostics, batch = make({"policy": ObsSpec((3,), "float32")}, 16)
    before = diagnostics.rollout(batch, num_windows=B).predicted["policy"]
    for name, row, moves in (("policy", 5, False), ("policy", 4, True), ("action", 5, True)):
        changed = batch.clone()
        changed[("obs", "policy") if name == "policy" else "action"][:, row:] += 3.0
        after = diagnostics.rollout(changed, num_windows=B).predicted["policy"]
        assert bool((after[:, 5:] != before[:, 5:]).any()) == moves, (name, row)
        assert torch.equal(after[:, :4], before[:, :4])


def test_a_rollout_begins_with_reconstructions_of_the_posterior_mean():
    step, diagnostics, batch = make({"policy": ObsSpec((3,), "float32")}, 9)
    model, noise = step.world_model, torch.zeros(3, B, 4)
    seen = {"policy": batch["obs", "policy"][:, :3]}
    posterior = model.observe(seen, batch["action"][:, :3], batch["is_first"][:, :3], noise)
    shown = diagnostics.rollout(batch, num_windows=B)
    order = [
        (batch["obs", "policy"] == window).flatten(1).all(1).nonzero().item() for window in shown.observed["policy"]
    ]
    expected = model.decoder(feat(posterior.belief))["policy"][order]
    torch.testing.assert_close(shown.predicted["policy"][:, :3], expected, rtol=1e-5, atol=1e-6)


def test_errors_of_images_are_per_pixel_and_errors_of_vectors_in_standard_deviations():
    step, diagnostics, batch = make({"pixels": ObsSpec((64, 64, 1), "uint8"), "policy": ObsSpec((3,), "float32")}, 9)
    for param in step.world_model.decoder.parameters():
        torch.nn.init.zeros_(param)
    step.observe_statistics({"policy": torch.tensor([[[2.0] * 3], [[6.0] * 3]])})  # mean 4, std 2
    batch["obs", "pixels"][:] = 255
    batch["obs", "policy"][:] = 10.0
    batch["obs", "policy"][:, 2] = 4.0  # the last row of the context
    expected = {"open_loop_pixels_5": 0.25, "repeat_last_pixels_5": 0.0}
    expected |= {"open_loop_policy_5": 9.0, "repeat_last_policy_5": 9.0}
    assert errors(diagnostics, batch) == pytest.approx(expected)


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}, func
        return func(*args, **kwargs or {})


def test_diagnostics_do_not_synchronise_and_draw_no_random_numbers():
    step, diagnostics, batch = make({"pixels": ObsSpec((64, 64, 3), "uint8"), "policy": ObsSpec((3,), "float32")}, 20)
    state, before = torch.get_rng_state(), step.state_dict()
    with NoSync():
        found, shown = diagnostics(batch), diagnostics.rollout(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.metrics == diagnostics.metrics and len(found.metrics) == 8
    assert torch.isfinite(found.values).all() and not found.values.requires_grad
    assert shown.predicted["pixels"].shape == shown.observed["pixels"].shape == (1, 20, 64, 64, 3)
    assert all(torch.equal(t, before[group][k]) for group, ts in step.state_dict().items() for k, t in ts.items())


def test_a_trained_model_predicts_a_rotation_better_than_a_repetition():
    step, diagnostics, batch = make({"policy": ObsSpec((2,), "float32")}, 12)
    batch = cast(TensorDict, torch.cat(cast(Any, [batch] * 4)))
    angle = torch.rand(4 * B, 1) * 6.28 + 0.5 * torch.arange(12)
    batch["obs", "policy"] = torch.stack([angle.cos(), angle.sin()], -1)
    untrained = errors(diagnostics, batch)
    for _ in range(200):
        step(batch)
    found = errors(diagnostics, batch)
    # Half a radian per step: after five steps the point is 2 sin(1.25) away, and the mean over two dimensions is
    # half the square of that.
    assert found["repeat_last_policy_5"] == pytest.approx(2 * math.sin(1.25) ** 2, rel=1e-4)
    assert untrained["open_loop_policy_5"] > 0.4  # a prediction of the mean has an error of 0.5
    assert found["open_loop_policy_5"] < 0.1, found
