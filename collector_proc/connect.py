"""Connecting: the collector introduces itself, and the learner shares its replay memory with it.

    collector                          learner
      Hello ---------------------------->        what the simulator streams
            <-------------------- Welcome        with the replay: a descriptor of host memory, or a handle of GPU memory
      SelfTest ------------------------->        the collector has written a pattern to the rows of one chunk
            <---------------------- Grant        only if the learner finds the pattern there

If the collector cannot map the memory of the Welcome, or cannot write the pattern, it sends MappingFailed instead.
Then, or if the learner does not find the pattern, the answer is a Welcome with memory of another kind, or a Refusal.

Afterwards the learner sends grants (`learner_input`), and the collector answers each with a commit (`chunk_sender`).
"""

from __future__ import annotations

import gc
import hmac
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from collector_proc.copies import Copier
from collector_proc.writer import ChunkWriter
from shared.config import DeadlineSettings
from shared.errors import HandoverError, TransportError
from shared.handover import HOST_REPLAY, Channel, close_descriptors, import_cuda_slab, map_memfd_slab, pin_slab
from shared.messages import (
    MAX_REASON_CHARS,
    PROTOCOL,
    Grant,
    Hello,
    MappingFailed,
    Message,
    Refusal,
    SelfTest,
    Welcome,
)
from shared.stream import StreamSpec, plan_layout, ring_views

SELF_TEST_S = 30.0  # a copy between GPUs that takes longer will never finish
POLL_S = 0.0001  # between two looks at the copies of the self-test


class Connection:
    """A connection that the learner has accepted, and its replay, mapped into this process."""

    def __init__(
        self,
        channel: Channel,
        spec: StreamSpec,
        *,
        secret: bytes,
        device: torch.device,
        answer_s: float,
        alive: Callable[[], None],
    ) -> None:
        """Receive the learner's offer and map it. The hello must have been sent.

        secret: of the run. device: the acting device; if it is a GPU, a replay in host memory is page-locked.
        answer_s: the longest time until an answer of the learner. alive: called while waiting.
        Raises: HandoverError if the learner refuses or its offer does not fit; TransportError if it does not answer in
        time; Disconnected.
        """
        self.channel = channel
        self._spec, self._secret, self._device = spec, secret, device
        self._answer_s, self._alive = answer_s, alive
        self._abandoned: list[ChunkWriter] = []  # their copies never finished, so their memory must stay mapped
        self._map(*self._offer())

    @property
    def random_ticks(self) -> int:
        """Return the number of ticks that are still to be taken with random actions."""
        return -(-self.welcome.random_frames // self._spec.num_envs)  # rounded up

    def pass_self_test(
        self, *, ticks: int, copier: Copier | None = None, limit_s: float = SELF_TEST_S
    ) -> tuple[ChunkWriter, Grant]:
        """Write a pattern in the way in which chunks are written, and let the learner check it.

        If the memory cannot be written, map the memory that the learner offers instead, and write there.
        ticks: K, the rows of a chunk. copier: None chooses the one that fits the devices.
        Returns: the writer that passed, and the first grant; the learner grants rows only to a collector that passed.
        Raises: HandoverError if the learner refuses or its offer does not fit; TransportError if it does not answer in
        time; Disconnected.
        """
        while True:
            writer = ChunkWriter(self.ring, self.layout, ticks=ticks, device=self._device, copier=copier)
            reason, answer, descriptors = self._try_self_test(writer, limit_s), None, ()
            if not reason:
                answer, descriptors = self._receive("the result of the self-test")
                if isinstance(answer, Grant):
                    return writer, answer
            if _may_still_copy(writer):
                self._abandoned.append(writer)
            del writer, self.ring
            gc.collect()  # now nothing refers to the mapped memory, so torch unmaps it
            if reason:
                self.channel.send(MappingFailed(reason[:MAX_REASON_CHARS]))
                answer, descriptors = self._receive("the learner's second welcome")
            self._map(self._expect_welcome(answer), descriptors)

    def close(self, writer: ChunkWriter) -> None:
        """Unmap the replay, if the writer has no copy into it left, then close the connection.

        The learner waits for the end of file before it frees the replay's memory.
        """
        if not _may_still_copy(writer):
            writer.forget_ring()
            del self.ring
        self.channel.close()

    def _try_self_test(self, writer: ChunkWriter, limit_s: float) -> str:
        """Run the self-test and return why the collector could not write the pattern; empty if it could.

        Raises: torch.OutOfMemoryError, since other memory would not help; TransportError of the connection.
        """
        try:
            run_self_test(self, writer, alive=self._alive, limit_s=limit_s)
        except HandoverError as error:
            return str(error)
        except (TransportError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # CUDA cannot copy
            return (
                f"the self-test's copy into the replay failed: {str(error).splitlines()[0]}; expected the collector to "
                f"write to the learner's memory; {HOST_REPLAY}"
            )
        return ""

    def _offer(self) -> tuple[Welcome, tuple[int, ...]]:
        """Return the next offer of the learner."""
        answer, descriptors = self._receive("the learner's welcome")
        return self._expect_welcome(answer), descriptors

    def _receive(self, waiting_for: str) -> tuple[Message, tuple[int, ...]]:
        """Return the next message and its descriptors. Raises: HandoverError if it is a refusal."""
        answer, descriptors = self.channel.receive_within(self._answer_s, waiting_for=waiting_for, alive=self._alive)
        if isinstance(answer, Refusal):
            raise HandoverError(f"the learner refused this collector: {answer.reason}")
        return answer, descriptors

    def _expect_welcome(self, answer: Message | None) -> Welcome:
        """Return the answer if it is a Welcome of this run's learner. Raises: HandoverError, TransportError."""
        if not isinstance(answer, Welcome):
            raise HandoverError(
                f"the learner answered with {type(answer).__name__}; expected Welcome; start both processes from the "
                "same checkout"
            )
        if not hmac.compare_digest(answer.secret, self._secret):
            raise TransportError(
                "another process than this run's learner answers at the socket of the replay: its welcome lacks the "
                "secret of the run; expected the learner; end that process"
            )
        return answer

    def _map(self, welcome: Welcome, descriptors: tuple[int, ...]) -> None:
        """Map the memory of an offer, or, if that fails, that of the next offer.

        Raises: HandoverError if an offer does not fit this simulator's stream, or if the learner refuses.
        """
        while True:
            layout = plan_layout(self._spec, welcome.capacity)
            if layout.num_bytes != welcome.num_bytes:
                close_descriptors(descriptors)
                raise HandoverError(
                    f"the learner's replay has {welcome.num_bytes} bytes; expected {layout.num_bytes} for this "
                    "simulator's stream; start both processes from the same checkout and run folder"
                )
            try:
                slab = _map_slab(welcome, descriptors, self._device)
            except HandoverError as error:
                self.channel.send(MappingFailed(str(error)[:MAX_REASON_CHARS]))
                welcome, descriptors = self._offer()
                continue
            self.welcome, self.layout, self.ring = welcome, layout, ring_views(slab, layout)
            return


def open_replay(
    channel: Channel,
    spec: StreamSpec,
    deadlines: DeadlineSettings,
    *,
    run_id: str,
    secret: bytes,
    incarnation: int,
    device: torch.device,
    alive: Callable[[], None],
) -> Connection:
    """Introduce this collector to the learner and map the learner's replay into this process.

    secret: of the run; the learner must send it too. device: the acting device. alive: called while waiting.
    Raises: HandoverError if the learner refuses or its offer does not fit; TransportError if it does not answer in
    time, or if another process answers in its place; Disconnected if it ends.
    """
    channel.send(Hello(PROTOCOL, run_id, secret, incarnation, os.getpid(), spec.to_dict()))
    answer_s = deadlines.start_s + deadlines.compile_s  # the learner may be compiling
    return Connection(channel, spec, secret=secret, device=device, answer_s=answer_s, alive=alive)


def run_self_test(
    connection: Connection, writer: ChunkWriter, *, alive: Callable[[], None], limit_s: float = SELF_TEST_S
) -> None:
    """Write a pattern in the way in which chunks are written, and ask the learner to check it.

    alive: called while waiting.
    Raises: HandoverError if the copies are not complete within `limit_s`.
    """

    def wait() -> None:
        end = time.monotonic() + limit_s
        while not writer.done():
            alive()
            if time.monotonic() > end:
                raise HandoverError(
                    f"the self-test's copy into the replay has not finished after {limit_s:g} s; expected "
                    "milliseconds; copies between these GPUs may be broken: use one GPU for both processes, or set "
                    "replay_buffer.gpu_storage=false"
                )
            time.sleep(POLL_S)

    welcome = connection.welcome
    checksum, num_bytes, write_s = writer.write_pattern(welcome.test_row, nonce=welcome.nonce, wait=wait)
    connection.channel.send(SelfTest(checksum, num_bytes, write_s))


def _may_still_copy(writer: ChunkWriter) -> bool:
    """Return whether a copy may still run. After some errors, CUDA answers no question any more."""
    try:
        return not writer.done()
    except RuntimeError:
        return True


def _map_slab(welcome: Welcome, descriptors: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the replay's memory, (num_bytes,) uint8, and close the descriptors. Raises: HandoverError."""
    try:
        if welcome.transport != "memfd":
            return import_cuda_slab(welcome.uuid, welcome.handle, welcome.num_bytes, writer=device)
        if not descriptors:
            raise HandoverError(
                "the welcome came without the descriptor of the replay; expected one; this process may have too many "
                "open files: raise `ulimit -n`"
            )
        slab = map_memfd_slab(descriptors[0], welcome.num_bytes)
    finally:
        close_descriptors(descriptors)
    if device.type == "cuda":
        pin_slab(slab)
    return slab
