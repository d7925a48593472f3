"""Connecting: the collector introduces itself, and the learner shares its replay memory with it.

    collector                          learner
      Hello ---------------------------->        what the simulator streams
            <-------------------- Welcome        with the replay: a descriptor of host memory, or a handle of GPU memory
      SelfTest ------------------------->        the collector has written a pattern to the rows of one chunk
            <---------------------- Grant        only if the learner finds the pattern there

Afterwards the learner sends grants (`learner_input`), and the collector answers each with a commit (`chunk_sender`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from collector_proc.writer import ChunkWriter
from shared.config import DeadlineSettings
from shared.errors import HandoverError, TransportError
from shared.handover import Channel, import_cuda_slab, map_memfd_slab, pin_slab
from shared.messages import PROTOCOL, Hello, Refusal, SelfTest, Welcome
from shared.stream import Layout, StreamSpec, plan_layout, ring_views

SELF_TEST_S = 30.0  # a copy between GPUs that takes longer will never finish
POLL_S = 0.0001  # between two looks at the copies of the self-test


@dataclass(frozen=True)
class Connection:
    """A connection that the learner has accepted, and its replay, mapped into this process."""

    channel: Channel
    layout: Layout
    ring: TensorDict  # views of the replay's memory, batch size [T_cap]
    test_row: int  # the first row of the self-test
    nonce: int  # selects the pattern of the self-test
    random_ticks: int  # ticks that are still to be taken with random actions
    agent_steps: int  # of the whole run so far


def open_replay(
    channel: Channel,
    spec: StreamSpec,
    deadlines: DeadlineSettings,
    *,
    run_id: str,
    incarnation: int,
    device: torch.device,
    alive: Callable[[], None],
) -> Connection:
    """Introduce this collector to the learner and map the learner's replay into this process.

    device: the acting device; if it is a GPU, a replay in host memory is page-locked. alive: called while waiting.
    Raises: TransportError if the learner refuses or does not answer in time; Disconnected if it ends.
    """
    channel.send(Hello(PROTOCOL, run_id, incarnation, os.getpid(), spec.to_dict()))
    answer, descriptors = channel.receive_within(
        deadlines.start_s + deadlines.compile_s,  # the learner may be compiling
        waiting_for="the learner's welcome",
        alive=alive,
    )
    if isinstance(answer, Refusal):
        raise HandoverError(f"the learner refused this collector: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise TransportError(
            f"the learner answered the hello with {type(answer).__name__}; expected Welcome; "
            "start both processes from the same checkout"
        )
    layout = plan_layout(spec, answer.capacity)
    if layout.num_bytes != answer.num_bytes:
        raise TransportError(
            f"the learner's replay has {answer.num_bytes} bytes; expected {layout.num_bytes} for this simulator's "
            "stream; start both processes from the same checkout and run folder"
        )
    slab = _map_slab(answer, descriptors, device)
    random_ticks = -(-answer.random_frames // spec.num_envs)  # rounded up
    return Connection(
        channel, layout, ring_views(slab, layout), answer.test_row, answer.nonce, random_ticks, answer.agent_steps
    )


def run_self_test(
    connection: Connection, writer: ChunkWriter, *, alive: Callable[[], None], limit_s: float = SELF_TEST_S
) -> None:
    """Write a pattern in the way in which chunks are written, and ask the learner to check it.

    The learner grants rows and publishes weights only after this test has passed. alive: called while waiting.
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

    checksum, num_bytes, write_s = writer.write_pattern(connection.test_row, nonce=connection.nonce, wait=wait)
    connection.channel.send(SelfTest(checksum, num_bytes, write_s))


def _map_slab(welcome: Welcome, descriptors: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the replay's memory, (num_bytes,) uint8."""
    if welcome.transport != "memfd":
        return import_cuda_slab(welcome.uuid, welcome.handle, welcome.num_bytes)
    slab = map_memfd_slab(descriptors[0], welcome.num_bytes)
    os.close(descriptors[0])
    if device.type == "cuda":
        pin_slab(slab)
    return slab
