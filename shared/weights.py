"""Acting weights in one ZeroMQ frame: versioned, newest only.

    frame = uint32 header length | msgpack header {run_id, version, manifest, num_bytes} | raw bytes of every tensor

PUB -> SUB over ipc with CONFLATE on both ends (a high-water mark would drop the newest). The manifest is a hash of the
names, shapes and dtypes in order: both sides derive it from their own modules, so a mismatch is refused, not guessed at.
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
    """A frame that does not fit this run's modules; it is counted and dropped."""


def acting_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the acting policy by name, in a fixed order."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: named[name].detach() for name in sorted(named)}


def manifest_of(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and dtypes, in order."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def flat_views(flat: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views into a flat uint8 buffer, one per tensor, each 16-byte aligned."""
    views, offset = [], 0
    for tensor in tensors:
        views.append(flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += _aligned(tensor.nbytes)
    return views


def flat_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of the flat buffer that `flat_views` cuts up."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def pack_header(*, run_id: str, version: int, manifest: str, num_bytes: int) -> bytes:
    header = msgpack.packb({"run_id": run_id, "version": version, "manifest": manifest, "num_bytes": num_bytes})
    assert header is not None  # the stub allows None for a custom buffer
    return struct.pack("<I", len(header)) + header


def unpack_frame(frame: memoryview, *, run_id: str, manifest: str, num_bytes: int) -> tuple[int, memoryview]:
    """The version and the raw weights of a frame meant for this run and these modules.

    Raises: WeightsError otherwise.
    """
    if len(frame) < 4:
        raise WeightsError(f"frame of {len(frame)} bytes")
    length = struct.unpack_from("<I", frame)[0]
    if length > _MAX_HEADER_BYTES or 4 + length > len(frame):
        raise WeightsError(f"header of {length} bytes in a frame of {len(frame)}")
    try:
        header = msgpack.unpackb(frame[4 : 4 + length])
        got = (header["run_id"], header["manifest"], header["num_bytes"], len(frame) - 4 - length)
        version = header["version"]
    except Exception as error:  # msgpack raises many unrelated types
        raise WeightsError(f"unreadable header: {error!r:.100}") from error
    if got != (run_id, manifest, num_bytes, num_bytes) or type(version) is not int:
        raise WeightsError(f"frame is for {got!r:.200}, wanted {(run_id, manifest, num_bytes, num_bytes)!r:.200}")
    return version, frame[4 + length :]


def publisher_socket(socket_dir: str | Path) -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{Path(socket_dir) / SOCKET_NAME}")
    return socket


def subscriber_socket(socket_dir: str | Path, *, max_bytes: int) -> zmq.Socket:
    """max_bytes: size of the raw weights; a larger frame is refused by the library itself."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + 4 + _MAX_HEADER_BYTES)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(f"ipc://{Path(socket_dir) / SOCKET_NAME}")
    return socket


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
