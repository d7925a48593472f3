"""The weights of the acting policy in one ZeroMQ frame, with a version. The collector receives only the newest.

    frame = uint32 header length | msgpack header {run_id, version, manifest, num_bytes} | raw bytes of every tensor

The learner publishes (PUB) and the collector subscribes (SUB) over ipc. Both set CONFLATE, which keeps
only the newest frame; with a high-water mark, ZeroMQ would drop new frames and keep the oldest. The manifest is a hash
of the names, shapes and dtypes in order. Each process computes it from its own modules, so weights that do not fit are
refused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import zmq

if TYPE_CHECKING:
    from torch import Tensor, nn

SOCKET_NAME = "weights.sock"
_MAX_HEADER_BYTES = 1024


class WeightsError(ValueError):
    """A frame that does not fit this run or its modules. The receiver counts and drops it."""


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


def pack_header(*, run_id: str, version: int, manifest: str, num_bytes: int) -> bytes:
    """Return the start of a frame, up to the raw bytes; `num_bytes` is their size."""
    header = msgpack.packb({"run_id": run_id, "version": version, "manifest": manifest, "num_bytes": num_bytes})
    assert header is not None  # None is possible for packers with a buffer of their own
    return struct.pack("<I", len(header)) + header


def unpack_frame(frame: memoryview, *, run_id: str, manifest: str, num_bytes: int) -> tuple[int, memoryview]:
    """Return the version and the raw weights of a frame. Raises: WeightsError if it is not for this run and modules."""
    if len(frame) < 4:
        raise WeightsError(f"a frame has {len(frame)} bytes; expected at least 4")
    length = struct.unpack_from("<I", frame)[0]
    if length > _MAX_HEADER_BYTES or 4 + length > len(frame):
        raise WeightsError(
            f"a frame of {len(frame)} bytes has a header of {length} bytes; expected a whole one of at most "
            f"{_MAX_HEADER_BYTES}"
        )
    try:
        header = msgpack.unpackb(frame[4 : 4 + length])
        got = (header["run_id"], header["manifest"], header["num_bytes"], len(frame) - 4 - length)
        version = header["version"]
    except Exception as error:  # msgpack raises many unrelated types
        raise WeightsError(f"a frame's header cannot be read: {error!r:.100}; expected msgpack") from error
    expected = (run_id, manifest, num_bytes, num_bytes)
    if got != expected or type(version) is not int:
        raise WeightsError(f"a frame has version {version!r:.20} for {got!r:.200}; expected {expected!r:.200}")
    return version, frame[4 + length :]


def publisher_socket(socket_dir: str | Path) -> zmq.Socket:
    """Return the learner's socket."""
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{Path(socket_dir) / SOCKET_NAME}")
    return socket


def subscriber_socket(socket_dir: str | Path, *, max_bytes: int) -> zmq.Socket:
    """Return the collector's socket. ZeroMQ refuses frames with more than `max_bytes` bytes of weights."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + 4 + _MAX_HEADER_BYTES)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(f"ipc://{Path(socket_dir) / SOCKET_NAME}")
    return socket


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
