"""The Unix socket between collector and learner, and the slab of replay memory that the learner shares through it.

The learner listens and owns the slab. Each collector process connects, sends Hello and gets the slab with a Welcome:

    slab in host memory   the descriptor of a memfd travels with the message (SCM_RIGHTS), and both processes map it;
                          it has no name in /dev/shm, so a killed process leaves nothing behind
    slab in GPU memory    the integers and bytes of a CUDA IPC handle, opened on the GPU with the same UUID

One packet of the socket (SOCK_SEQPACKET) is one message. At end of file the other process has closed the connection or
has ended. Nothing is pickled. Only the functions that touch memory import torch, so a collector can connect before its
simulator allows it to import torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from shared.errors import HandoverError, TransportError
from shared.messages import MAX_MESSAGE_BYTES, MalformedMessage, Message, Welcome, decode, encode
from shared.socket_folder import REPLAY_SOCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import Tensor

HOST_REPLAY = "keep the replay in host memory with replay_buffer.gpu_storage=false"
MAX_MALFORMED = 8  # malformed messages that one call of `Channel.receive` drops; the others wait in the socket


class Disconnected(TransportError):
    """The other process closed the socket or ended."""


def listen(socket_dir: str | Path) -> socket.socket:
    """Return the learner's listening socket, non-blocking, in the run's folder for sockets."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(Path(socket_dir) / REPLAY_SOCKET))
    listener.listen(4)
    listener.setblocking(False)
    return listener


def connect(socket_dir: str | Path, *, deadline_s: float, alive: Callable[[], None]) -> Channel:
    """Return a channel to the learner. Try again while the learner starts, and call `alive` before each new try.

    Raises: TransportError if no process listens within `deadline_s` seconds.
    """
    path, end = str(Path(socket_dir) / REPLAY_SOCKET), time.monotonic() + deadline_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)  # otherwise connect() waits without a deadline while the learner's queue is full
        try:
            sock.connect(path)
            return Channel(sock)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            if time.monotonic() > end:
                raise TransportError(
                    f"no learner listens at {path} after {deadline_s:.0f} s ({error}); expected a running learner of "
                    "this run folder; look at logs/learner.out, or raise deadlines.start_s"
                ) from error
        alive()
        time.sleep(0.05)


class Channel:
    """One end of the connection. It sends and receives whole messages; malformed ones are counted and dropped."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self.num_malformed = 0

    def fileno(self) -> int:
        """Return the descriptor of the socket, for select and poll."""
        return self._socket.fileno()

    def send(
        self,
        message: Message,
        fds: tuple[int, ...] = (),
        *,
        deadline_s: float = 10.0,
        alive: Callable[[], None] | None = None,
    ) -> None:
        """Send one message, with the descriptors `fds`. Wait for room in the socket, and call `alive` while waiting.

        Raises: Disconnected if the other process has ended; TransportError if it reads nothing within `deadline_s` s.
        """
        raw, end = encode(message), time.monotonic() + deadline_s
        while True:
            try:
                socket.send_fds(self._socket, [raw], list(fds)) if fds else self._socket.send(raw)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TransportError(
                        f"the other process has not read its messages for {deadline_s:.0f} s, so this "
                        f"{type(message).__name__} cannot be sent; expected it to read them; look at its log in logs/"
                    ) from None
            except (BrokenPipeError, ConnectionResetError) as error:
                raise Disconnected("the other process closed the connection") from error
            if alive is not None:
                alive()
            self._poll(select.POLLOUT, 0.05)

    def try_send(self, message: Message) -> bool:
        """Send one message if the socket has room now, and return whether it did. Raises: Disconnected."""
        try:
            self._socket.send(encode(message))
            return True
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Disconnected("the other process closed the connection") from error

    def receive(self) -> tuple[Message, tuple[int, ...]] | None:
        """Return the next message and the descriptors that came with it, or None if no message has arrived.

        Only a Welcome may bring descriptors; those of other messages are closed. After MAX_MALFORMED malformed messages
        the result is None too, so that a process that sends many of them cannot keep this one busy.
        Raises: Disconnected at end of file.
        """
        for _ in range(MAX_MALFORMED):
            try:
                raw, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                # The other process ended with unread messages. The kernel reports this once, before the messages that
                # it had sent: read on to the end of file, because commits among them count.
                continue
            try:
                if not raw:
                    raise Disconnected("the other process closed the connection")
                message = decode(raw)
                if isinstance(message, Welcome):
                    taken, fds = tuple(fds), []
                    return message, taken
                return message, ()
            except MalformedMessage:
                self.num_malformed += 1
            finally:
                close_descriptors(fds)
        return None

    def wait(self, timeout_s: float) -> bool:
        """Return True as soon as a message or the end of file can be read, False after `timeout_s` seconds."""
        return self._poll(select.POLLIN, timeout_s)

    def receive_within(
        self, deadline_s: float, *, waiting_for: str, alive: Callable[[], None]
    ) -> tuple[Message, tuple[int, ...]]:
        """Return the next message and its descriptors; call `alive` while waiting. `waiting_for` is for the error.

        Raises: TransportError if no message arrives within `deadline_s` seconds; Disconnected at end of file.
        """
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            received = self.receive()
            if received is not None:
                return received
            alive()
            self.wait(0.05)
        raise TransportError(
            f"waited {deadline_s:.0f} s for {waiting_for} and got no message; expected an answer in time; look at the "
            "log of the other process in logs/, or raise deadlines.start_s or deadlines.compile_s"
        )

    def close(self, *, wait_s: float = 0.0) -> None:
        """Close the socket; the other process reads end of file.

        wait_s: wait at most so many seconds until the other process has closed its end too; drop what it still sends.
        """
        end = time.monotonic() + wait_s
        with contextlib.suppress(OSError, Disconnected):  # OSError: the other process ended before
            self._socket.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                if self.receive() is None:
                    self.wait(left)
        self._socket.close()

    def _poll(self, event: int, timeout_s: float) -> bool:
        poller = select.poll()  # select() fails for descriptors above 1023, and a simulator may have that many open
        poller.register(self._socket, event)
        return bool(poller.poll(timeout_s * 1000.0))


def close_descriptors(descriptors: Iterable[int]) -> None:
    """Close descriptors that came with a message and are not used."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def create_memfd_slab(num_bytes: int) -> tuple[Tensor, int]:
    """Return shared host memory, filled with zeros, as a uint8 tensor, and the descriptor to send to the collector."""
    fd = os.memfd_create("tandem-replay", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return map_memfd_slab(fd, num_bytes), fd


def map_memfd_slab(fd: int, num_bytes: int) -> Tensor:
    """Return the memory of a received descriptor as a uint8 tensor. Raises: TransportError if its size is another."""
    import torch

    if os.fstat(fd).st_size != num_bytes:
        raise TransportError(
            f"the memfd of the replay has {os.fstat(fd).st_size} bytes; expected {num_bytes}, as in the Welcome; "
            "start the run again"
        )
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


def pin_slab(slab: Tensor) -> None:
    """Page-lock mapped host memory, so that copies to and from a GPU are asynchronous. Raises: HandoverError."""
    import torch

    cudart: Any = torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
    if status != 0:
        raise HandoverError(
            f"cannot pin {slab.numel() / 2**30:.1f} GiB of host memory (CUDA error {status}); expected page-locked "
            "memory for the replay; raise `ulimit -l`, lower replay_buffer.buffer_size or set "
            "replay_buffer.gpu_storage=true"
        )


def export_cuda_slab(slab: Tensor) -> tuple[str, list]:
    """Return the GPU's UUID and a CUDA IPC handle of a slab. Each importing process needs a handle of its own.

    A handle carries a reference count and an event, which torch makes for one importer.

    Raises: HandoverError if CUDA cannot share this memory.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    try:
        arguments: Any = reduce_tensor(slab)[1]  # torch's type is a union over all kinds of tensors
    except RuntimeError as error:
        raise HandoverError(
            f"CUDA cannot share the replay's memory with another process: {str(error).splitlines()[0]}; expected CUDA "
            f"IPC to work (it does not in some virtual machines and containers); {HOST_REPLAY}"
        ) from error
    handle, size, offset, counter, counter_offset, event, event_sync = arguments[7], *arguments[8:10], *arguments[11:15]
    # A handle of 64 bytes is one of cudaMalloc. A longer one has a version byte, then c (cudaMalloc) or e (expandable).
    if len(handle) != 64 and handle[1:2] != b"c":
        raise HandoverError(
            f"the replay's CUDA handle is of kind {handle[1:2]!r}; expected memory that cudaMalloc allocated; "
            "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
        )
    uuid = str(torch.cuda.get_device_properties(slab.device).uuid)
    return uuid, [handle, size, offset, counter, counter_offset, event, event_sync]


def import_cuda_slab(uuid: str, handle: list, num_bytes: int, *, writer: torch.device | None = None) -> Tensor:
    """Return the learner's slab in this process, where the GPU may have another index.

    writer: the GPU that copies into the slab. If it can write to the slab's GPU directly (peer access), the slab is
    mapped for it: the tensor's device is then the writer's GPU, although the memory is on the learner's GPU. A copy is
    one command on the writer's stream. Otherwise the slab is mapped for its own GPU. Torch then lets a stream of that
    GPU take part in each copy, and this has to wait until the learner's work leaves it a moment.
    Use the tensor only as the target of copies: a kernel must not run on the memory of another GPU.
    Raises: HandoverError.
    """
    import torch

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if uuid not in uuids:
        raise HandoverError(
            f"the replay is on GPU {uuid}, but the collector sees only {uuids}; expected that GPU among them; "
            "start the collector through launch.py, which sets CUDA_VISIBLE_DEVICES"
        )
    own, counter = uuids.index(uuid), tuple(handle[3:5])
    peer = own if writer is None or writer.type != "cuda" else writer.index or 0
    if peer != own and torch.cuda.can_device_access_peer(peer, own):
        try:
            return _open_cuda_slab(handle, num_bytes, peer, waits=False)
        except RuntimeError as error:
            structlog.get_logger().warning(
                "the replay cannot be mapped for the simulator's GPU, so copies into it wait for the learner's GPU too",
                error=str(error).splitlines()[0],
            )
    try:
        return _open_cuda_slab(handle, num_bytes, own, waits=handle[-1])
    except RuntimeError as error:
        # Otherwise torch would wait for this process before it frees the learner's memory.
        with contextlib.suppress(RuntimeError):
            torch.UntypedStorage._release_ipc_counter_cuda(*counter)
        raise HandoverError(
            f"the collector cannot map the replay on GPU {uuid}: {str(error).splitlines()[0]}; expected CUDA IPC to "
            f"work between the two processes; {HOST_REPLAY}"
        ) from error


def _open_cuda_slab(handle: list, num_bytes: int, index: int, *, waits: bool) -> Tensor:
    """Map the slab for the GPU of this index. Torch opens the handle while this GPU is the current one.

    waits: let the GPU's current stream wait for the event of the handle. For another GPU than the slab's this may be
    impossible. It is not needed either, because the learner waits for all work on the slab before it exports it.
    """
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    memory, size, offset, counter, counter_offset, event, _ = handle
    return rebuild_cuda_tensor(
        torch.Tensor, (num_bytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, index,
        memory, size, offset, False, counter, counter_offset, event, waits,
    )  # fmt: skip
