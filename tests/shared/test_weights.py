"""The frame that carries weights: a frame for other modules, another run or with damaged bytes is refused."""

import hmac
import struct

import pytest
from torch import nn

from shared.weights import WeightsError, acting_tensors, manifest_of, pack_header, unpack_frame

SECRET = bytes(range(32))


def signed(header: bytes) -> bytes:
    """Return a frame with the right signature of a header that the learner would not write."""
    return struct.pack("<I", len(header)) + hmac.digest(SECRET, header, "sha256") + header + b"12345678"


def network(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def test_the_manifest_differs_for_modules_of_different_shape():
    assert manifest_of(acting_tensors(network())) == manifest_of(acting_tensors(network()))
    assert manifest_of(acting_tensors(network())) != manifest_of(acting_tensors(network(width=6)))


def test_a_frame_for_this_run_and_these_modules_gives_its_version_and_its_weights():
    frame = pack_header(run_id="run", secret=SECRET, version=7, manifest="m", num_bytes=8) + b"12345678"
    version, weights = unpack_frame(memoryview(frame), run_id="run", secret=SECRET, manifest="m", num_bytes=8)
    assert (version, bytes(weights)) == (7, b"12345678")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff" + b"x" * 60,
        pack_header(run_id="run", secret=SECRET, version=1, manifest="m", num_bytes=8) + b"1234567",
        pack_header(run_id="run", secret=SECRET, version=1, manifest="n", num_bytes=8) + b"12345678",
        pack_header(run_id="nur", secret=SECRET, version=1, manifest="m", num_bytes=8) + b"12345678",
        pack_header(run_id="run", secret=SECRET, version="1", manifest="m", num_bytes=8) + b"12345678",  # type: ignore[arg-type]
        pack_header(run_id="run", secret=SECRET, version=0, manifest="m", num_bytes=8) + b"12345678",
        pack_header(run_id="run", secret=SECRET, version=-1, manifest="m", num_bytes=8) + b"12345678",
        pack_header(run_id="run", secret=SECRET, version=2**64 - 1, manifest="m", num_bytes=8) + b"12345678",
        pack_header(run_id="run", secret=bytes(32), version=1, manifest="m", num_bytes=8) + b"12345678",
        pack_header(run_id="run", secret=b"", version=1, manifest="m", num_bytes=8) + b"12345678",
        signed(b"\x91" * 499 + b"\xc0"),
        signed(b"\xc1\xc1\xc1"),
        signed(b"\x90"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(frame):
    with pytest.raises(WeightsError):
        unpack_frame(memoryview(frame), run_id="run", secret=SECRET, manifest="m", num_bytes=8)
