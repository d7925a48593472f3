"""Weights in one frame: newest only, adopted in place, anything foreign refused."""

import time

import pytest
import torch
from torch import nn

from collector_proc.weights_receiver import WeightsReceiver
from learner_proc.publisher import Publisher
from shared.weights import WeightsError, acting_tensors, manifest_of, pack_header, unpack_frame


class Network(nn.Module):
    def __init__(self, seed: int, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 2)
        self.count: torch.Tensor
        self.register_buffer("count", torch.tensor(float(seed)))


def adopt_within(receiver: WeightsReceiver, publisher: Publisher, version: int, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while receiver.version < version and time.monotonic() < end:
        receiver.adopt()
        publisher.flush()
        time.sleep(0.005)
    assert receiver.version == version


def connect_pair(folder, source, target, run_id="run"):
    publisher = Publisher(source, socket_dir=folder, run_id="run")
    receiver = WeightsReceiver(target, socket_dir=folder, run_id=run_id)
    return publisher, receiver


def test_the_newest_weights_arrive_in_place_and_older_ones_are_never_seen(tmp_path):
    source, target = Network(1), Network(2)
    publisher, receiver = connect_pair(tmp_path, source, target)
    publisher.publish()
    end = time.monotonic() + 10
    while not receiver.adopt():  # the first may be lost while the subscription is on its way
        assert time.monotonic() < end
        publisher.republish()
        time.sleep(0.01)
    addresses = [tensor.data_ptr() for tensor in acting_tensors(target).values()]
    for step in range(50):
        with torch.no_grad():
            source.first.weight.fill_(float(step))
        publisher.publish()
    adopt_within(receiver, publisher, 51)
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
    end = time.monotonic() + 10
    while receiver.num_refused == 0 and time.monotonic() < end:
        publisher.publish()
        receiver.adopt()
        time.sleep(0.01)
    assert receiver.num_refused > 0 and receiver.version == 0
    assert torch.equal(target.first.weight, before)
    publisher.close()
    receiver.close()


def test_the_manifest_tells_modules_of_different_shape_apart():
    assert manifest_of(acting_tensors(Network(1))) == manifest_of(acting_tensors(Network(2)))
    assert manifest_of(acting_tensors(Network(1))) != manifest_of(acting_tensors(Network(1, width=6)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff" + b"x" * 20,
        pack_header(run_id="run", version=1, manifest="m", num_bytes=8) + b"1234567",
        pack_header(run_id="run", version=1, manifest="n", num_bytes=8) + b"12345678",
        pack_header(run_id="nur", version=1, manifest="m", num_bytes=8) + b"12345678",
        b"\x05\0\0\0\xc1\xc1\xc1\xc1\xc1" + b"12345678",
    ],
)
def test_a_frame_that_does_not_fit_is_refused(frame):
    with pytest.raises(WeightsError):
        unpack_frame(memoryview(frame), run_id="run", manifest="m", num_bytes=8)


@pytest.mark.gpu
def test_weights_adopted_by_a_gpu_are_there_for_what_its_stream_is_given_next(tmp_path):
    source, target = Network(1), Network(2).to("cuda:0")
    publisher, receiver = connect_pair(tmp_path, source, target)
    for version in range(1, 6):
        with torch.no_grad():
            source.first.weight.fill_(float(version))
        publisher.publish()
        end = time.monotonic() + 10
        while receiver.version < version:
            assert time.monotonic() < end
            receiver.adopt()
            publisher.republish()
            time.sleep(0.005)
        assert (target.first.weight == float(version)).all() and target.count == 1.0
    publisher.close()
    receiver.close()
