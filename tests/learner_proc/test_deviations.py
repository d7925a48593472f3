"""Deviations of another implementation from Dreamer V1, and the tests which show that this one does not have them.

The numbers come from our comparison of TorchRL 0.14's Dreamer V1 with the original code. That comparison lists 34
deviations, of which the 16 below change or harm what is learned. A deviation has tests here, with its number in their
names, or it is in `TESTED_ELSEWHERE` with the test that would fail if we had it.

 1  beliefs continue across episode ends        2  a batch mixes trajectories after a short slice
 3  short episodes are sampled too often        4  the first observation of a window is never learned from
 5  windows start from old stored beliefs       6  the first belief of an episode skips the transition
 7  the belief gets the action without noise    8  the terminal observation is invented
11  squared errors lack the factor 1/2         12  a vector's loss is summed over batch and time
13  the KL is clipped per dimension            15  settings that no code reads
16  imagined rewards and values are sampled    20  imagination does not know termination
23  the std has a hard lower limit             32  the ratio of replayed to collected steps is not fixed
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from collector_proc.simulators.base import Arrival
from collector_proc.simulators.pendulum.simulator import PendulumSimulator, pendulum_frame, pendulum_obs
from collector_proc.writer import ChunkWriter
from learner_proc.behavior import Behavior
from learner_proc.gradient_step import GradientStep
from learner_proc.heads import ScalarHead
from learner_proc.replay import Replay
from learner_proc.world_model import WorldModel
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.model.policy import Policy
from shared.model.rssm import Belief, Posterior
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views

TESTS = Path(__file__).parents[1]
B, L, A, S, D = 3, 6, 2, 3, 5
SPEC = StreamSpec(1, {"policy": ObsSpec((4,), "float32")}, A)

TESTED_ELSEWHERE = {
    1: "learner_proc/test_world_model.py::test_nothing_before_an_is_first_influences_the_rows_after_it",
    5: "learner_proc/test_world_model.py::"
    "test_a_window_inside_an_episode_starts_from_a_zero_belief_and_its_recorded_action",
    6: "shared/model/test_rssm.py::"
    "test_the_first_step_of_an_episode_is_an_ordinary_step_from_zero_belief_and_zero_action",
    7: "learner_proc/test_world_model.py::"
    "test_observing_recorded_rows_gives_the_beliefs_of_acting_if_the_executed_action_is_stored",
    11: "learner_proc/test_world_model.py::test_a_perfect_decoder_has_a_loss_of_half_log_two_pi_per_dimension",
    12: "learner_proc/test_world_model.py::test_the_loss_does_not_grow_with_the_number_of_windows_or_steps",
    20: "learner_proc/test_behavior.py::test_nothing_after_a_predicted_end_counts",
    23: "shared/model/test_rssm.py::test_the_std_of_prior_and_posterior_is_always_above_a_tenth",
    32: "learner_proc/test_pacing.py::test_the_ratio_is_kept_whichever_side_is_faster",
}
CHANGE_WHAT_IS_LEARNED = {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 20, 23, 32}


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_deviation_that_changes_what_is_learned_has_its_test():
    here = {int(name.split("_")[2]) for name in functions(Path(__file__)) if name.startswith("test_deviation_")}
    assert here | set(TESTED_ELSEWHERE) == CHANGE_WHAT_IS_LEARNED


@pytest.mark.parametrize("number", TESTED_ELSEWHERE)
def test_the_test_for_a_deviation_exists(number):
    path, name = TESTED_ELSEWHERE[number].split("::")
    assert name in functions(TESTS / path)


# ---- sequences ----------------------------------------------------------------------------------------------------


def episodes(lengths: list[list[int]]) -> Replay:
    """A ring with one column of whole episodes for each list; reward = 1000 * column + row."""
    rows = sum(lengths[0])
    assert all(sum(column) == rows for column in lengths)
    layout = plan_layout(StreamSpec(len(lengths), SPEC.obs, A), rows)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    replay = Replay(slab, layout, ticks_per_chunk=rows, seed=0, device=torch.device("cpu"))
    row = replay.grant()
    for index, column in enumerate(lengths):
        replay.views["reward"][:, index] = 1000.0 * index + torch.arange(rows)
        ends = torch.tensor(column).cumsum(0) - 1
        replay.views["is_last"][ends, index] = True
        replay.views["is_first"][(ends + 1) % rows, index] = True
    replay.commit(row)
    return replay


def test_deviation_2_windows_keep_their_length_and_their_rows_in_order_where_every_episode_is_shorter():
    batch = episodes([[3] * 20, [4] * 15]).sample(300, L)
    assert batch["reward"].shape == (300, L) and (batch["reward"].diff(dim=1) == 1.0).all()
    row, period = batch["reward"] % 1000, torch.where(batch["reward"] >= 1000, 4, 3)
    assert torch.equal(batch["is_first"], row % period == 0)


def test_deviation_3_rows_of_short_episodes_are_drawn_as_often_as_those_of_a_long_one():
    replay = episodes([[600], [2] * 300])  # by trajectories the long one would make up 1 of 301 windows
    starts = replay.sample(4000, 2)["reward"][:, 0]
    assert (starts < 1000).float().mean().item() == pytest.approx(0.5, abs=0.04)
    first_half = (starts[starts < 1000] < 300).float().mean().item()
    assert first_half == pytest.approx(0.5, abs=0.06)


def test_deviation_8_the_row_of_an_ended_episode_holds_its_own_last_observation_not_the_next_ones_first():
    layout = plan_layout(StreamSpec(2, {"policy": ObsSpec((1,), "float32")}, 1), 1)
    ring = ring_views(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout)
    writer = ChunkWriter(ring, layout, ticks=1, device=torch.device("cpu"))
    true, fresh = {"policy": torch.tensor([[7.0], [8.0]])}, {"policy": torch.tensor([[7.0], [-1.0]])}
    ended = torch.tensor([False, True])
    arrival = Arrival(true, torch.ones(2), torch.zeros_like(ended), ended, ended, acting_obs=fresh)
    writer.add(arrival, torch.zeros(2, 1), policy_version=0)
    writer.write(0)
    assert ring["obs", "policy"][0, :, 0].tolist() == [7.0, 8.0]


def test_deviation_8_the_last_observation_of_an_episode_is_one_step_of_the_physics_from_the_one_before():
    settings = Settings()
    settings.env.backend, settings.env.num_envs, settings.env.horizon = "pendulum", 5, 3
    settings.env.name, settings.env.task = "pendulum", "swingup"
    simulator = PendulumSimulator(settings, seed=0, device="cpu")
    arrivals = [simulator.reset(), *(simulator.step(torch.full((5, 1), 0.5)) for _ in range(4))]
    cosine, sine, speed = arrivals[2].obs["policy"].unbind(-1)
    state = torch.stack([torch.atan2(sine, cosine), speed * 8], -1)
    for _ in range(simulator.frames_per_step):
        state, _ = pendulum_frame(state, torch.full((5, 1), 0.5))
    assert arrivals[3].is_last.all() and arrivals[4].is_first.all()
    torch.testing.assert_close(arrivals[3].obs["policy"], pendulum_obs(state), rtol=0.0, atol=1e-4)


def world_model(cont: bool = False, **optimization: Any) -> WorldModel:
    torch.manual_seed(0)
    networks = NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8, continue_head=cont)
    settings = Settings(networks=networks, optimization=OptimizationSettings(**optimization))
    return WorldModel(SPEC, settings, Policy(SPEC, networks))


def test_deviation_4_the_first_row_of_a_window_is_encoded_decoded_rewarded_and_counted_like_any_other():
    model, is_first = world_model(cont=True, free_nats=0.0), torch.zeros(B, L, dtype=torch.bool)
    obs, reward = torch.randn(B, L, 4), torch.randn(B, L, requires_grad=True)
    seen, decoded = obs.clone().requires_grad_(), obs.clone().requires_grad_()
    action, noise = torch.rand(B, L, A), torch.randn(L, B, S)
    posterior = model.observe({"policy": seen}, action, is_first, noise)
    losses = model.loss({"policy": decoded}, posterior, reward, torch.zeros(B, L, dtype=torch.bool))
    for grad in torch.autograd.grad(losses.total, [seen, decoded, reward], retain_graph=True):
        assert grad[:, 0].any() and grad[:, L - 1].any()
    ended = is_first.clone()
    ended[:, 0] = True
    assert model.loss({"policy": decoded}, posterior, reward, ended).cont != losses.cont


# ---- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_nats_per", ["mean", "step"])
@pytest.mark.parametrize("balance", [None, 0.8])
def test_deviation_13_the_kl_is_summed_over_dimensions_before_the_free_nats(free_nats_per, balance):
    model = world_model(free_nats=3.0, free_nats_per=free_nats_per, kl_balance=balance)
    deter = torch.zeros(1, 1, D)
    prior_mean, prior_std = (part.detach() for part in model.rssm.prior(deter))
    mean = (prior_mean + 2.0 * prior_std).requires_grad_()  # 2 nats in each of three dimensions, 3 in none
    kl = model.kl(Posterior(Belief(deter, mean), mean, prior_std))
    assert [kl.mean.item(), kl.loss.item(), kl.free.item()] == pytest.approx([6.0, 6.0, 0.0], rel=1e-4)
    to_posterior, to_prior = torch.autograd.grad(kl.loss, [mean, model.rssm.prior_out.bias])
    assert to_posterior.all() and to_prior[:S].all()


def test_deviation_16_returns_are_made_of_means_and_never_of_samples():
    torch.manual_seed(0)
    heads = [ScalarHead(7, layers, NetworkSettings(hidden_dim=8)) for layers in (2, 3, 3)]
    behavior = Behavior(heads[0], heads[1], heads[2], OptimizationSettings())
    feat, alive, entropy = torch.randn(4, 5, 7), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 5)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs = {name: head(feat) for name, head in behavior.heads().items()}
        losses.append(behavior.actor_loss(**outputs, start_terminal=alive, entropy=entropy))
    assert torch.equal(losses[0].target, losses[1].target) and torch.equal(losses[0].total, losses[1].total)
    assert losses[0].reward_mean.item() == pytest.approx(heads[0](feat).mean().item(), rel=1e-6)


# ---- settings -----------------------------------------------------------------------------------------------------

ALGORITHM = {
    "optimization": {
        "grad_clip": 1e-3,
        "world_model_lr": 1e-2,
        "actor_lr": 1e-2,
        "value_lr": 1e-2,
        "adam_eps": 1e-1,
        "kl_scale": 3.0,
        "kl_balance": 0.8,
        "free_nats": 100.0,
        "free_nats_per": "step",
        "reward_scale": 9.0,
        "continue_scale": 1.0,
        "gamma": 0.5,
        "lmbda": 0.1,
        "imagination_horizon": 5,
        "imagination_starts": 4,
        "actor_gradient": "reinforce",
        "entropy_scale": 0.1,
        "slow_critic_decay": 0.9,
        "return_norm": "percentile",
        "autocast": "bfloat16",
    },
    "networks": {
        "state_dim": 4,
        "rssm_hidden_dim": 6,
        "hidden_dim": 9,
        "activation": "relu",
        "continue_head": False,
        "normalize_obs": False,
        "symlog_obs": True,
        "init_std": 2.0,
        "actor_min_std": 0.3,
    },
}
# settings of the loop, the processes or the collector; encoder_channels is counted with images, the rest in their tests
NOT_THE_STEPS = {
    "optimization": {
        *("total_optim_steps", "log_every", "replay_ratio", "pretrain_steps", "publish_every", "compile"),
        *("max_skipped", "max_rollbacks"),
    },
    "networks": {"encoder_channels", "exploration_noise"},
}
CASES = [(section, key) for section, values in ALGORITHM.items() for key in values]


def trained(**changes: dict[str, Any]) -> torch.Tensor:
    """Every parameter after three steps on one batch of large rewards and observations, as one vector."""
    networks = {"state_dim": S, "rssm_hidden_dim": D, "hidden_dim": 8, "continue_head": True, "init_std": 1.0}
    optimization = {"autocast": "false", "imagination_horizon": 4, "compile": CompileSettings(enabled=False)}
    settings = Settings(
        networks=NetworkSettings(**networks | changes.get("networks", {})),
        optimization=OptimizationSettings(**optimization | changes.get("optimization", {})),
    )
    torch.manual_seed(0)
    step = GradientStep(SPEC, settings, device=torch.device("cpu"))
    torch.manual_seed(1)
    obs = TensorDict({"policy": 5 * torch.randn(B, L, 4)}, [B, L])
    flags = {name: torch.rand(B, L) < 0.2 for name in ("is_first", "is_last", "is_terminal")}
    fields = {"action": torch.rand(B, L, A) * 2 - 1, "reward": 30 * torch.randn(B, L), **flags}
    batch = TensorDict({"obs": obs, **fields}, [B, L])
    step.observe_statistics({"policy": obs["policy"]})
    for _ in range(3):
        step(batch)
    modules = (step.world_model, step.policy.actor, step.critic)
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


@pytest.fixture(scope="module")
def unchanged() -> torch.Tensor:
    return trained()


def test_a_repeated_run_ends_in_the_same_parameters(unchanged):
    assert torch.equal(trained(), unchanged)


@pytest.mark.parametrize(("section", "key"), CASES)
def test_deviation_15_every_setting_of_the_algorithm_changes_what_is_learned(section, key, unchanged):
    found = trained(**{section: {key: ALGORITHM[section][key]}})
    assert found.shape != unchanged.shape or not torch.equal(found, unchanged)


@pytest.mark.parametrize(("section", "kind"), [("optimization", OptimizationSettings), ("networks", NetworkSettings)])
def test_deviation_15_no_setting_of_the_algorithm_was_forgotten_here(section, kind):
    assert set(ALGORITHM[section]) | NOT_THE_STEPS[section] == set(kind.__dataclass_fields__)
