"""Weights that a publisher sends reach the receiver's policy: the newest ones, in place, and only those of this run."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from collector_proc.weights_receiver import WeightsReceiver
from learner_proc.publisher import Publisher
from shared.model.capture import capture
from shared.socket_folder import WEIGHTS_SOCKET, FolderWatch, read_secret
from shared.weights import acting_tensors, flat_bytes, manifest_of, pack_header, publisher_socket


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.count: torch.Tensor
        self.register_buffer("count", torch.tensor(float(seed)))


def connect_pair(folder, source: Network, target: Network, run_id: str = "run") -> tuple[Publisher, WeightsReceiver]:
    publisher = Publisher(source, socket_dir=folder, run_id="run")
    receiver = WeightsReceiver(target, socket_dir=folder, run_id=run_id)
    return publisher, receiver


def adopt_version(receiver: WeightsReceiver, publisher: Publisher, version: int) -> None:
    end = time.monotonic() + 300
    while receiver.version < version and time.monotonic() < end:
        receiver.adopt()
        publisher.flush()
        time.sleep(0.005)
    assert receiver.version == version


def test_only_the_newest_weights_are_adopted_and_they_keep_the_parameters_memory(tmp_path):
    source, target = Network(1), Network(2)
    publisher, receiver = connect_pair(tmp_path, source, target)
    publisher.publish(step=0)
    end = time.monotonic() + 300
    while not receiver.adopt():  # the first message is lost if the subscription is not complete yet
        assert time.monotonic() < end
        publisher.republish()
        time.sleep(0.01)
    addresses = [tensor.data_ptr() for tensor in acting_tensors(target).values()]
    for step in range(50):
        with torch.no_grad():
            source.first.weight.fill_(float(step))
        publisher.publish(step=0)
    adopt_version(receiver, publisher, 51)
    assert (target.first.weight == 49.0).all() and target.count == 1.0
    assert [tensor.data_ptr() for tensor in acting_tensors(target).values()] == addresses
    publisher.republish()
    time.sleep(0.05)
    assert not receiver.adopt(), "the same version must not be adopted twice"
    publisher.close()
    receiver.close()


def test_weights_of_another_run_are_refused_and_counted(tmp_path):
    source, target = Network(1), Network(2)
    before = target.first.weight.clone()
    publisher, receiver = connect_pair(tmp_path, source, target, run_id="other")
    end = time.monotonic() + 300
    while receiver.num_refused == 0 and time.monotonic() < end:
        publisher.publish(step=0)
        receiver.adopt()
        time.sleep(0.01)
    assert receiver.num_refused > 0 and receiver.version == 0
    assert torch.equal(target.first.weight, before)
    publisher.close()
    receiver.close()


def test_an_endpoint_that_another_process_takes_over_is_named_and_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr("collector_proc.weights_receiver.RECONNECT_S", 0.0)
    source, target = Network(1), Network(2)
    publisher = Publisher(source, socket_dir=tmp_path, run_id="run")
    watch = FolderWatch(tmp_path, read_secret(tmp_path))
    watch.add(WEIGHTS_SOCKET, publisher.bind_again)
    (tmp_path / WEIGHTS_SOCKET).unlink()
    thief = publisher_socket(tmp_path)
    receiver = WeightsReceiver(target, socket_dir=tmp_path, run_id="run")
    manifest, num_bytes = manifest_of(acting_tensors(target)), flat_bytes(acting_tensors(target).values())
    header = pack_header(run_id="run", secret=bytes(32), version=99, manifest=manifest, num_bytes=num_bytes)
    end = time.monotonic() + 300
    while receiver.num_refused == 0 and time.monotonic() < end:
        thief.send(header + bytes(num_bytes))
        publisher.publish(step=0)
        assert not receiver.adopt()
        time.sleep(0.005)
    assert "not signed with the secret of this run" in receiver.last_refusal
    assert "another process" in watch.check_now()[WEIGHTS_SOCKET]
    while receiver.version == 0 and time.monotonic() < end:
        publisher.publish(step=0)
        if not receiver.adopt():
            receiver.reconnect_if_silent()
        time.sleep(0.02)
    assert 0 < receiver.version < 99 and (target.first.weight == source.first.weight).all()
    assert watch.check_now() == {}
    for part in (publisher, receiver, thief):
        part.close()


def test_a_connected_collector_keeps_getting_weights_after_the_endpoint_was_bound_again(tmp_path):
    publisher, receiver = connect_pair(tmp_path, Network(1), Network(2))
    publisher.publish(step=0)
    end = time.monotonic() + 300
    while not receiver.adopt() and time.monotonic() < end:
        publisher.republish()
        time.sleep(0.01)
    publisher.bind_again()
    publisher.publish(step=1)
    adopt_version(receiver, publisher, 2)
    publisher.close()
    receiver.close()


@pytest.mark.gpu
def test_work_that_is_queued_after_an_adoption_uses_the_new_weights(tmp_path):
    source, target = Network(1), Network(2).to("cuda:0")
    publisher, receiver = connect_pair(tmp_path, source, target)
    for version in range(1, 6):
        with torch.no_grad():
            source.first.weight.fill_(float(version))
        publisher.publish(step=0)
        end = time.monotonic() + 300
        while receiver.version < version:
            assert time.monotonic() < end
            receiver.adopt()
            publisher.republish()
            time.sleep(0.005)
        assert (target.first.weight == float(version)).all() and target.count == 1.0
    publisher.close()
    receiver.close()


@pytest.mark.gpu
def test_a_graph_that_was_captured_before_an_adoption_uses_the_new_weights(tmp_path):
    source, target = Network(1), Network(2).to("cuda:0")
    publisher, receiver = connect_pair(tmp_path, source, target)
    launch, doubled = capture(lambda: target.first.weight * 2, torch.device("cuda", 0), shared_process=True)
    with torch.no_grad():
        source.first.weight.fill_(3.0)
    publisher.publish(step=0)
    end = time.monotonic() + 300
    while not receiver.adopt():
        assert time.monotonic() < end
        publisher.republish()
        time.sleep(0.005)
    launch()
    assert (doubled == 6.0).all()
    publisher.close()
    receiver.close()
