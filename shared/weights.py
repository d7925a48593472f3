"""The weights of the acting policy in one ZeroMQ frame, with a version. The collector receives only the newest.

    frame = uint32 header length | signature | msgpack header {run_id, version, manifest, num_bytes} | raw bytes

The learner publishes (PUB) and the collector subscribes (SUB) over ipc. Both set CONFLATE, which keeps
only the newest frame; with a high-water mark, ZeroMQ would drop new frames and keep the oldest. The manifest is a hash
of the names, shapes and dtypes in order. Each process computes it from its own modules, so weights that do not fit are
refused. The signature is the HMAC-SHA256 of the header with the secret of the run (`shared.socket_folder`). It shows
that this run's learner has sent the weights.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from shared.socket_folder import WEIGHTS_SOCKET

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_VERSION = 1 << 48
_HEADER = {"run_id": str, "version": int, "manifest": str, "num_bytes": int}
_PREFIX = struct.Struct("<I32s")
_MAX_HEADER_BYTES = 1024
_MAX_REQUEST_BYTES = 256  # the longest message that a subscriber may send to the learner


class WeightsError(ValueError):
    """A frame that does not fit this run or its modules. The receiver counts and drops it."""


class ForeignWeightsError(WeightsError):
    """A frame that is not signed with this run's secret: another process has the endpoint of the weights."""


def acting_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module by its name, sorted by name."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: named[name].detach() for name in sorted(named)}


def manifest_of(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the names, shapes and dtypes, in order."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def flat_views(flat: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return views into a flat uint8 buffer, one for each tensor and of its shape and dtype, aligned to 16 bytes."""
    views, offset = [], 0
    for tensor in tensors:
        views.append(flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += _aligned(tensor.nbytes)
    return views


def flat_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of the flat buffer that `flat_views` needs, in bytes."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def pack_header(*, run_id: str, secret: bytes, version: int, manifest: str, num_bytes: int) -> bytes:
    """Return the start of a frame, up to the raw bytes; `num_bytes` is their size."""
    header = msgpack.packb({"run_id": run_id, "version": version, "manifest": manifest, "num_bytes": num_bytes})
    assert header is not None  # None is possible for packers with a buffer of their own
    return _PREFIX.pack(len(header), hmac.digest(secret, header, "sha256")) + header


def unpack_frame(
    frame: memoryview, *, run_id: str, secret: bytes, manifest: str, num_bytes: int
) -> tuple[int, memoryview]:
    """Return the version and the raw weights of a frame.

    Raises: ForeignWeightsError if this run's learner did not sign it; WeightsError if it is malformed or not for these
    modules.
    """
    header, weights = _signed_header(frame, run_id, secret)
    if header["run_id"] != run_id:
        raise ForeignWeightsError(f"weights of run {header['run_id']!r:.64} arrived; expected run {run_id!r}")
    found = (header["manifest"], header["num_bytes"], len(weights))
    if found != (manifest, num_bytes, num_bytes):
        raise WeightsError(f"a frame is for the networks {found!r:.200}; expected {(manifest, num_bytes, num_bytes)}")
    if not 1 <= header["version"] <= MAX_VERSION:
        raise WeightsError(f"a frame has version {header['version']}; expected 1 to {MAX_VERSION}")
    return header["version"], weights


def _signed_header(frame: memoryview, run_id: str, secret: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the header of a frame, with fields of the right types, and the raw weights. Raises: WeightsError."""
    if len(frame) < _PREFIX.size:
        raise WeightsError(f"a frame has {len(frame)} bytes; expected at least {_PREFIX.size}")
    length, signature = _PREFIX.unpack_from(frame)
    end = _PREFIX.size + length
    if length > _MAX_HEADER_BYTES or end > len(frame):
        raise WeightsError(
            f"a frame of {len(frame)} bytes has a header of {length} bytes; expected a whole one of at most "
            f"{_MAX_HEADER_BYTES}"
        )
    packed = bytes(frame[_PREFIX.size : end])
    if not hmac.compare_digest(signature, hmac.digest(secret, packed, "sha256")):
        raise ForeignWeightsError(f"weights arrived that are not signed with the secret of this run, {run_id!r}")
    try:
        header = msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises many unrelated types
        raise WeightsError(f"a frame's header cannot be read: {error!r:.100}; expected msgpack") from error
    if not isinstance(header, dict) or {key: type(value) for key, value in header.items()} != _HEADER:
        raise WeightsError(f"a frame's header has other fields than expected; expected {', '.join(_HEADER)}")
    return header, frame[end:]


def publisher_socket(socket_dir: str | Path) -> zmq.Socket:
    """Return the learner's socket."""
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)  # of subscriptions: nothing else is ever received here
    socket.bind(endpoint(socket_dir))
    return socket


def subscriber_socket(socket_dir: str | Path, *, max_bytes: int) -> zmq.Socket:
    """Return the collector's socket. ZeroMQ refuses frames with more than `max_bytes` bytes of weights."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + _PREFIX.size + _MAX_HEADER_BYTES)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint(socket_dir))
    return socket


def endpoint(socket_dir: str | Path) -> str:
    """Return the address of the weights. A second process can bind it, without an error for the first one."""
    return f"ipc://{Path(socket_dir) / WEIGHTS_SOCKET}"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
