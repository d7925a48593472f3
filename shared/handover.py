"""The Unix socket between collector and learner, and the slab of replay memory handed over it.

The learner listens and owns the memory; a collector incarnation connects, says hello and is sent the slab once:

    CPU or host storage   a memfd by SCM_RIGHTS, mapped on both sides: no name in /dev/shm, nothing to leak
    GPU storage           the plain ints and bytes of a CUDA IPC handle, rebuilt on the GPU with the same UUID

One SOCK_SEQPACKET packet is one message; end of file is the obituary. Nothing here pickles, and torch is imported only
by the functions that touch memory, so a collector can connect before its simulator lets it import torch.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import TransportError
from shared.messages import MAX_MESSAGE_BYTES, MalformedMessage, Message, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SOCKET_NAME = "replay.sock"


class Disconnected(TransportError):
    """The other process closed the socket or died."""


def listen(socket_dir: str | Path) -> socket.socket:
    """A non-blocking listening socket in the run's private folder."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(Path(socket_dir) / SOCKET_NAME))
    listener.listen(4)
    listener.setblocking(False)
    return listener


def connect(socket_dir: str | Path, *, deadline_s: float, alive: Callable[[], None]) -> Channel:
    """Connect to the learner, retrying while it starts; `alive` is called between tries.

    Raises: TransportError when nobody listens within `deadline_s` seconds.
    """
    path, end = str(Path(socket_dir) / SOCKET_NAME), time.monotonic() + deadline_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(path)
            return Channel(sock)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            if time.monotonic() > end:
                raise TransportError(
                    f"no learner listens at {path} after {deadline_s:.0f} s ({error}); wanted a running learner of this "
                    "run folder; look at logs/learner.out, or raise deadlines.start_s"
                ) from error
        alive()
        time.sleep(0.05)


class Channel:
    """One end of the connection: whole messages in and out, malformed ones counted and dropped."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self.num_malformed = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(
        self,
        message: Message,
        fds: tuple[int, ...] = (),
        *,
        deadline_s: float = 10.0,
        alive: Callable[[], None] | None = None,
    ) -> None:
        """Send one message, waiting for room in the socket for at most `deadline_s` seconds.

        Raises: Disconnected if the peer is gone; TransportError if it does not read within the deadline.
        """
        raw, end = encode(message), time.monotonic() + deadline_s
        while True:
            try:
                socket.send_fds(self._socket, [raw], list(fds)) if fds else self._socket.send(raw)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TransportError(
                        f"the peer has not read its messages for {deadline_s:.0f} s; last wanted to send {type(message).__name__}"
                    ) from None
            except (BrokenPipeError, ConnectionResetError) as error:
                raise Disconnected("the peer closed the connection") from error
            if alive is not None:
                alive()
            self._poll(select.POLLOUT, 0.05)

    def try_send(self, message: Message) -> bool:
        """Send one message if the socket has room for it now. Raises: Disconnected if the peer is gone."""
        try:
            self._socket.send(encode(message))
            return True
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Disconnected("the peer closed the connection") from error

    def receive(self) -> tuple[Message, tuple[int, ...]] | None:
        """The next message and the descriptors sent with it, or None if none waits.

        Raises: Disconnected at end of file.
        """
        while True:
            try:
                raw, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES + 1, 1)
            except BlockingIOError:
                return None
            except ConnectionResetError as error:
                raise Disconnected("the peer reset the connection") from error
            if not raw:
                for fd in fds:
                    os.close(fd)
                raise Disconnected("the peer closed the connection")
            try:
                return decode(raw), tuple(fds)
            except MalformedMessage:
                self.num_malformed += 1
                for fd in fds:
                    os.close(fd)

    def wait(self, timeout_s: float) -> bool:
        """True as soon as a message (or end of file) can be read, False after `timeout_s` seconds."""
        return self._poll(select.POLLIN, timeout_s)

    def receive_within(
        self, deadline_s: float, *, waiting_for: str, alive: Callable[[], None]
    ) -> tuple[Message, tuple[int, ...]]:
        """Raises: TransportError naming `waiting_for` when nothing arrives in time; Disconnected at end of file."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            received = self.receive()
            if received is not None:
                return received
            alive()
            self.wait(0.05)
        raise TransportError(f"waited {deadline_s:.0f} s for {waiting_for}; nothing came")

    def close(self) -> None:
        self._socket.close()

    def _poll(self, event: int, timeout_s: float) -> bool:
        poller = select.poll()  # select() fails for descriptors beyond 1023, and a simulator may hold that many
        poller.register(self._socket, event)
        return bool(poller.poll(timeout_s * 1000.0))


def create_memfd_slab(num_bytes: int) -> tuple[Tensor, int]:
    """Zero-filled shared host memory as a uint8 tensor, and the descriptor to send."""
    fd = os.memfd_create("tandem-replay", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return map_memfd_slab(fd, num_bytes), fd


def map_memfd_slab(fd: int, num_bytes: int) -> Tensor:
    """The same memory, from a received descriptor."""
    import torch

    if os.fstat(fd).st_size != num_bytes:
        raise TransportError(f"the replay's memfd has {os.fstat(fd).st_size} bytes, the welcome said {num_bytes}")
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


def pin_slab(slab: Tensor) -> None:
    """Page-lock mapped host memory, so that copies to and from a GPU run asynchronously."""
    import torch

    cudart: Any = torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
    if status != 0:
        raise TransportError(
            f"cannot pin {slab.numel() / 2**30:.1f} GiB of host memory (CUDA error {status}); wanted page-locked replay "
            "memory; raise `ulimit -l`, lower replay_buffer.buffer_size or use replay_buffer.gpu_storage=true"
        )


def export_cuda_slab(slab: Tensor) -> tuple[str, list]:
    """GPU uuid and IPC handle of a slab; a fresh reference count and event for every importer.

    Raises: TransportError if the allocator made memory that a legacy handle cannot export.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    arguments: Any = reduce_tensor(slab)[1]  # typed as a union of every kind of tensor
    handle, size, offset, counter, counter_offset, event, event_sync = arguments[7], *arguments[8:10], *arguments[11:15]
    if len(handle) != 64 and handle[1:2] != b"c":  # a version byte, then c (cudaMalloc) or e (expandable segment)
        raise TransportError(
            f"the replay's CUDA handle is of kind {handle[1:2]!r}, wanted one of cudaMalloc memory; "
            "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
        )
    uuid = str(torch.cuda.get_device_properties(slab.device).uuid)
    return uuid, [handle, size, offset, counter, counter_offset, event, event_sync]


def import_cuda_slab(uuid: str, handle: list, num_bytes: int) -> Tensor:
    """The learner's slab, mapped into this process on whichever index the GPU has here."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if uuid not in uuids:
        raise TransportError(
            f"the replay lies on GPU {uuid}, this process sees {uuids}; wanted it among CUDA_VISIBLE_DEVICES; "
            "start the collector through launch.py, which sets the mask"
        )
    memory, size, offset, counter, counter_offset, event, event_sync = handle
    return rebuild_cuda_tensor(
        torch.Tensor, (num_bytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, uuids.index(uuid),
        memory, size, offset, False, counter, counter_offset, event, event_sync,
    )  # fmt: skip
