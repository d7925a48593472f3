"""Arrivals that are moved from a simulator in host memory to the acting device."""

from __future__ import annotations

import pytest
import torch

from collector_proc.arrival_mover import ArrivalMover
from collector_proc.simulators.base import Arrival

E = 64


def host_arrival(tick: int) -> Arrival:
    """Return an arrival with observation 1000 * environment + tick; its flags differ from each other."""
    obs = (1000.0 * torch.arange(E) + tick)[:, None].expand(E, 32).contiguous()
    first, last, terminal, diverged = (torch.arange(E) % 7 == remainder for remainder in (0, 1, 2, 3))
    reward = 100.0 * torch.arange(E) + tick
    return Arrival({"policy": obs}, reward, first, last, terminal, acting_obs={"policy": obs + 0.5}, diverged=diverged)


def test_an_arrival_on_the_acting_device_is_returned_as_it_is():
    arrival = host_arrival(0)
    assert ArrivalMover(torch.device("cpu")).move(arrival) is arrival


@pytest.mark.gpu
def test_every_entry_of_a_host_arrival_reaches_the_gpu():
    device = torch.device("cuda:0")
    mover = ArrivalMover(device)
    for tick in range(3):
        sent = host_arrival(tick)
        arrival = mover.move(sent)
        assert arrival.obs["policy"].device == device
        assert arrival.acting_obs is not None and sent.acting_obs is not None
        for name in ("reward", "is_first", "is_last", "is_terminal", "diverged"):
            assert torch.equal(getattr(arrival, name).cpu(), getattr(sent, name)), name
        assert torch.equal(arrival.obs["policy"].cpu(), sent.obs["policy"])
        assert torch.equal(arrival.acting_obs["policy"].cpu(), sent.acting_obs["policy"])
