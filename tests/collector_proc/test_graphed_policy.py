"""The acting step between fixed addresses: the same actions and beliefs as `Policy.act`, and no trace of its making."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from collector_proc.actor import Actor
from collector_proc.graphed_policy import WARM_UPS, GraphedPolicy
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.model.policy import Policy
from shared.model.rssm import Belief
from shared.stream import ObsSpec, StreamSpec

E, A, TICKS = 4, 2, 6
SPEC = StreamSpec(E, {"policy": ObsSpec((3,), "float32"), "pixels": ObsSpec((64, 64, 1), "uint8")}, A)
NETWORKS = NetworkSettings(state_dim=4, rssm_hidden_dim=8, hidden_dim=8, encoder_channels=2, init_std=1.0)
CPU = torch.device("cpu")
RTOL, ATOL = 1e-5, 1e-6


def rehearsed(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Runs the step as often as a capture does, and then hands out the step itself."""
    for _ in range(WARM_UPS + 1):
        step()
    return step


def make_policy() -> tuple[Policy, Callable]:
    torch.manual_seed(1)
    policy = Policy(SPEC, NETWORKS).requires_grad_(False)
    return policy, partial(policy.act, noise_std=0.3, evaluation=torch.tensor([3]), eval_action="mode")


def ticks() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Observations, and reset flags that blank environment 1 in the middle."""
    source = torch.Generator().manual_seed(7)
    for tick in range(TICKS):
        pixels = torch.randint(0, 256, (E, 64, 64, 1), dtype=torch.uint8, generator=source)
        reset = torch.tensor([tick == 0, tick in (0, 3), tick == 0, tick == 0])
        yield {"policy": torch.randn(E, 3, generator=source), "pixels": pixels}, reset


def test_actions_and_beliefs_are_those_of_the_plain_step_and_the_belief_moves_on_in_place():
    policy, act = make_policy()
    kept = policy.initial_belief(E)
    graphed = GraphedPolicy(act, SPEC, kept, capture=rehearsed)
    addresses = [part.data_ptr() for part in kept]
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        belief, action, seen = policy.initial_belief(E), torch.zeros(E, A), []
        for obs, reset in ticks():
            if results:
                action = graphed(obs, action.clone(), reset).clone()
                belief = Belief(*(part.clone() for part in kept))
            else:
                action, belief = act(obs, belief, action, reset)
            seen.append((action, *belief))
        results.append(seen)
    for plain, ours in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert [part.data_ptr() for part in kept] == addresses


def test_making_it_leaves_belief_and_random_states_as_they_were():
    policy, act = make_policy()
    belief = Belief(*(torch.full_like(part, 0.25) for part in policy.initial_belief(E)))
    before = torch.get_rng_state()
    GraphedPolicy(act, SPEC, belief, capture=rehearsed)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((part == 0.25).all() for part in belief)


def test_weights_written_in_place_are_used_from_the_next_call_on():
    policy, act = make_policy()
    graphed = GraphedPolicy(act, SPEC, policy.initial_belief(E), capture=rehearsed)
    obs, reset = next(ticks())
    before = graphed(obs, torch.zeros(E, A), reset).clone()
    for parameter in policy.actor.parameters():
        parameter.fill_(1e3)  # the mean saturates at +-5, its tanh at +-1
    assert before.abs().max() < 1 and graphed(obs, torch.zeros(E, A), reset)[3].abs().min() > 0.99


def test_on_a_cpu_the_plain_step_acts():
    actor = Actor(SPEC, NETWORKS, CollectorSettings(eval_envs=0), device=CPU, seed=0, random_ticks=0)
    first = actor.belief
    obs, reset = next(ticks())
    none = torch.zeros(E, dtype=torch.bool)
    actor.act(Arrival(obs, torch.zeros(E), reset, none, none), torch.zeros(E, A), version=1)
    assert actor.belief is not first, "a graph would have moved it on in place"


def make_actor(device: torch.device, *, graphs: bool) -> Actor:
    torch.manual_seed(1)
    settings = CollectorSettings(eval_envs=1, cudagraphs=graphs)
    return Actor(SPEC, NETWORKS, settings, device=device, seed=3, random_ticks=0)


@pytest.mark.gpu
def test_on_a_gpu_the_graph_acts_like_the_plain_step_with_the_same_noise_and_adopted_weights():
    device, results = torch.device("cuda:0"), []
    for graphs in (False, True):
        actor = make_actor(device, graphs=graphs)
        action, seen = torch.zeros(E, A, device=device), []
        for tick, (obs, reset) in enumerate(ticks()):
            if tick == TICKS - 2:  # as WeightsReceiver does: in place, between two ticks
                for parameter in actor.policy.parameters():
                    parameter.mul_(0.5)
            obs = {name: entry.to(device) for name, entry in obs.items()}
            none = torch.zeros(E, dtype=torch.bool, device=device)
            row = Arrival(obs, torch.zeros(E, device=device), reset.to(device), none, none)
            action = actor.act(row, action, version=1).clone()
            seen.append((action, *(part.clone() for part in actor.belief)))
        results.append(seen)
    for plain, ours in zip(*results, strict=True):
        for one, other in zip(plain, ours, strict=True):
            torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL)


@pytest.mark.gpu
def test_capture_leaves_belief_and_random_states_of_a_gpu_as_they_were():
    device = torch.device("cuda:0")
    plain, graphed = (make_actor(device, graphs=graphs) for graphs in (False, True))
    assert all((part == 0).all() for part in graphed.belief)
    states = []
    for graphs in (False, True):
        make_actor(device, graphs=graphs)
        states.append(torch.cuda.get_rng_state(device))
    assert torch.equal(*states)
    assert plain._graphed is None and graphed._graphed is not None
