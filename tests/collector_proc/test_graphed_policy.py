"""The acting step as a CUDA graph gives the same actions and beliefs as `Policy.act`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from collector_proc.acting_policy import ActingPolicy
from collector_proc.graphed_policy import GraphedPolicy
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


def capture_nothing(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Run the step several times, as a capture does, and return the step itself."""
    for _ in range(4):
        step()
    return step


def make_policy() -> tuple[Policy, Callable]:
    torch.manual_seed(1)
    policy = Policy(SPEC, NETWORKS).requires_grad_(False)
    return policy, partial(policy.explore, noise_std=0.3)


def ticks() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield random observations and reset flags; environment 1 also resets at tick 3."""
    source = torch.Generator().manual_seed(7)
    for tick in range(TICKS):
        pixels = torch.randint(0, 256, (E, 64, 64, 1), dtype=torch.uint8, generator=source)
        reset = torch.tensor([tick == 0, tick in (0, 3), tick == 0, tick == 0])
        yield {"policy": torch.randn(E, 3, generator=source), "pixels": pixels}, reset


def test_actions_and_beliefs_equal_those_of_the_plain_step_and_the_belief_keeps_its_memory():
    policy, act = make_policy()
    belief_in_place = policy.initial_belief(E)
    graphed = GraphedPolicy(act, SPEC, belief_in_place, capture=capture_nothing)
    addresses = [part.data_ptr() for part in belief_in_place]
    results = []
    for use_graph in (False, True):
        torch.manual_seed(5)
        belief, action, seen = policy.initial_belief(E), torch.zeros(E, A), []
        for obs, reset in ticks():
            if use_graph:
                action = graphed(obs, action.clone(), reset).clone()
                belief = Belief(*(part.clone() for part in belief_in_place))
            else:
                action, belief = act(obs, belief, action, reset)
            seen.append((action, *belief))
        results.append(seen)
    for plain, ours in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert [part.data_ptr() for part in belief_in_place] == addresses


def test_the_constructor_leaves_belief_and_random_state_unchanged():
    policy, act = make_policy()
    belief = Belief(*(torch.full_like(part, 0.25) for part in policy.initial_belief(E)))
    before = torch.get_rng_state()
    GraphedPolicy(act, SPEC, belief, capture=capture_nothing)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((part == 0.25).all() for part in belief)


def test_weights_that_are_written_in_place_are_used_from_the_next_call_on():
    policy, act = make_policy()
    graphed = GraphedPolicy(act, SPEC, policy.initial_belief(E), capture=capture_nothing)
    obs, reset = next(ticks())
    before = graphed(obs, torch.zeros(E, A), reset).clone()
    for parameter in policy.actor.parameters():
        parameter.fill_(1e3)  # also the std, so that every sample is at a limit, and noise moves it by a third at most
    after = graphed(obs, torch.zeros(E, A), reset)
    assert before.abs().mean() < 0.6 and after.abs().mean() > 0.65


def make_acting(device: torch.device, *, graphs: bool) -> ActingPolicy:
    torch.manual_seed(1)
    settings = CollectorSettings(eval_envs=1, cudagraphs=graphs)
    return ActingPolicy(SPEC, NETWORKS, settings, device=device, seed=3, random_ticks=0)


def test_a_cpu_acts_without_a_graph():
    assert not make_acting(CPU, graphs=True).uses_graph


@pytest.mark.gpu
def test_on_a_gpu_the_graph_acts_like_the_plain_step_with_the_same_noise_and_adopted_weights():
    device, results = torch.device("cuda:0"), []
    for graphs in (False, True):
        acting = make_acting(device, graphs=graphs)
        action, seen = torch.zeros(E, A, device=device), []
        for tick, (obs, reset) in enumerate(ticks()):
            if tick == TICKS - 2:  # change the weights in place between two ticks, as WeightsReceiver does
                for parameter in acting.policy.parameters():
                    parameter.mul_(0.5)
            obs = {name: entry.to(device) for name, entry in obs.items()}
            none = torch.zeros(E, dtype=torch.bool, device=device)
            row = Arrival(obs, torch.zeros(E, device=device), reset.to(device), none, none)
            action = acting.act(row, action, version=1).clone()
            seen.append((action, *(part.clone() for part in acting.belief)))
        results.append(seen)
    for plain, ours in zip(*results, strict=True):
        for one, other in zip(plain, ours, strict=True):
            torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL)


@pytest.mark.gpu
def test_a_capture_leaves_belief_and_random_state_of_a_gpu_unchanged():
    device = torch.device("cuda:0")
    plain, graphed = (make_acting(device, graphs=graphs) for graphs in (False, True))
    assert all((part == 0).all() for part in graphed.belief)
    states = []
    for graphs in (False, True):
        make_acting(device, graphs=graphs)
        states.append(torch.cuda.get_rng_state(device))
    assert torch.equal(*states)
    assert not plain.uses_graph and graphed.uses_graph
