"""Four ways of moving chunks from a sender process to a receiver, with the same chunk and the same work on both sides.

    ring              the collector's ChunkWriter writes granted rows of the learner's memory; grant and commit messages
    tensor queue      a torch.multiprocessing queue; each chunk is copied into new shared memory (GPU: a CUDA handle)
    tensordict queue  a TensorDict through the same queue
    pickle queue      a multiprocessing queue of numpy arrays

A sender has a gathered chunk, writes the chunk's number into the rewards and sends it. In the end the chunk is in the
receiver's ring.
"""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import structlog
import torch
import torch.multiprocessing as multiprocessing
from tensordict import TensorDict

from collector_proc.writer import ChunkWriter
from learner_proc.handshake import Handshake
from learner_proc.link import CollectorLink
from learner_proc.pacing import MAX_GRANTED
from learner_proc.replay import Replay
from shared.handover import (
    Disconnected,
    connect,
    create_memfd_slab,
    import_cuda_slab,
    map_memfd_slab,
)
from shared.messages import PROTOCOL, Commit, Grant, Hello, SelfTest, Welcome
from shared.socket_folder import make_socket_dir, read_secret, remove_socket_dir
from shared.stream import DTYPE_BYTES, Layout, ObsSpec, StreamSpec, plan_layout, ring_views

KINDS = ("ring", "tensor queue", "tensordict queue", "pickle queue")
SECONDS = 60.0  # deadline of every wait
CHUNKS_HELD = 4
_QUIET = structlog.wrap_logger(
    structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)


@dataclass(frozen=True)
class ChunkShape:
    """The size of a chunk. An environment observes `num_obs` numbers; 0 stands for a 64x64x3 image."""

    num_envs: int
    ticks: int
    num_obs: int

    @property
    def spec(self) -> StreamSpec:
        """Return what is streamed."""
        if self.num_obs:
            return StreamSpec(self.num_envs, {"policy": ObsSpec((self.num_obs,), "float32")}, 12)
        return StreamSpec(self.num_envs, {"pixels": ObsSpec((64, 64, 3), "uint8")}, 6)

    @property
    def layout(self) -> Layout:
        """Return the layout of a ring that holds a few chunks."""
        return plan_layout(self.spec, self.ticks * CHUNKS_HELD)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one chunk."""
        fields = self.layout.fields
        sizes = (DTYPE_BYTES[f.dtype] * math.prod(f.shape) * (self.num_envs if f.per_env else 1) for f in fields)
        return self.ticks * sum(sizes)


class Stream:
    """The receiver of one kind of stream (one of KINDS). It starts its sender."""

    def __init__(self, kind: str, shape: ChunkShape, *, device: str) -> None:
        self._shape, self._device = shape, torch.device(device)
        self._ring = _Ring(shape, self._device) if kind == "ring" else _Queue(kind, shape, self._device)
        self._received = 0

    def receive(self, chunks: int) -> dict[str, float]:
        """Receive chunks and return the pace.

        Raises: TimeoutError; AssertionError if a received chunk differs from the one that was sent.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        row = self._ring.take(chunks)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self._received += chunks
        stamp = self._ring.views["reward"][row : row + self._shape.ticks]
        assert (stamp == self._received).all(), (stamp.unique(), self._received)
        return {
            "chunks_per_s": chunks / wall,
            "gb_per_s": chunks * self._shape.num_bytes / wall / 1e9,
            "wall_ms": wall / chunks * 1e3,
            "receiver_cpu_ms": cpu / chunks * 1e3,
        }

    def close(self) -> None:
        """End the sender and release the memory."""
        self._ring.close()


class _Ring:
    """Receives through the learner's own link and replay."""

    def __init__(self, shape: ChunkShape, device: torch.device) -> None:
        self._sockets, self._shape, self._device = make_socket_dir(), shape, device
        self._link = CollectorLink(
            self._sockets,
            Handshake(
                run_id="benchmark",
                secret=read_secret(self._sockets),
                num_envs=shape.num_envs,
                allocate=self._allocate,
                random_frames=lambda: 0,
                agent_steps=lambda: 0,
                gpu_storage=True,
                log=_QUIET,
            ),
            check_sums=False,
            log=_QUIET,
        )
        self._child = _start(_send_to_ring, shape, str(self._sockets), str(device))
        self._taken = self._row = 0
        self._descriptor: int | None = None
        end = time.monotonic() + SECONDS
        while self._link.streaming is None:
            _check(self._child, end)
            self._serve()  # the chunk granted after the self-test may arrive in the same call
            self._link.wait(0.01)

    @property
    def views(self) -> TensorDict:
        assert self._link.shared is not None
        return self._link.shared.replay.views

    def take(self, chunks: int) -> int:
        end = time.monotonic() + SECONDS
        while self._taken < chunks:
            streaming = self._link.streaming
            assert streaming is not None, "the sender has disconnected"
            while streaming.shared.replay.num_granted < min(MAX_GRANTED, chunks - self._taken):
                streaming.grant()
            if not self._serve():
                _check(self._child, end)
                self._link.wait(0.01)
        self._taken = 0
        return self._row

    def _serve(self) -> bool:
        chunks = self._link.poll()
        for chunk in chunks:
            self._row, self._taken = chunk.commit.row, self._taken + 1
        self._link.flush()
        return bool(chunks)

    def close(self) -> None:
        self._link.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
        _end(self._child)
        remove_socket_dir(self._sockets, is_own=True)

    def _allocate(self, spec: StreamSpec, on_gpu: bool) -> tuple[Replay, int | None]:
        slab, self._descriptor = _slab(self._shape, self._device)
        layout = self._shape.layout
        return Replay(slab, layout, ticks_per_chunk=self._shape.ticks, seed=0, device=self._device), self._descriptor


class _Queue:
    """Receives through a queue of at most two chunks, and copies each into a ring of the same layout."""

    def __init__(self, kind: str, shape: ChunkShape, device: torch.device) -> None:
        self._shape = shape
        slab, descriptor = _slab(shape, device)
        if descriptor is not None:
            os.close(descriptor)  # the mapping stays
        self.views = ring_views(slab, shape.layout)
        context = multiprocessing.get_context("spawn")
        self._queue, self._go = context.Queue(MAX_GRANTED), context.Semaphore(0)
        self._child = _start(_send_to_queue, kind, shape, self._queue, self._go, str(device))
        self._next = 0

    def take(self, chunks: int) -> int:
        row = 0
        for _ in range(chunks):
            self._go.release()
        for _ in range(chunks):
            content: Any = self._queue.get(timeout=SECONDS)
            row, self._next = self._next, (self._next + self._shape.ticks) % self._shape.layout.capacity
            for entry in self._shape.layout.fields:
                value = content[entry.key if isinstance(content, TensorDict) else entry.name]
                if not isinstance(value, torch.Tensor):
                    value = torch.from_numpy(value)
                self.views.get(entry.key)[row : row + self._shape.ticks].copy_(value)
        return row

    def close(self) -> None:
        _end(self._child)


def _send_to_ring(shape: ChunkShape, sockets: str, device: str) -> None:
    """Run the collector's side of the handover and its writer, with a chunk that is already gathered."""
    torch.set_num_threads(1)
    channel = connect(sockets, deadline_s=SECONDS, alive=lambda: None)
    channel.send(Hello(PROTOCOL, "benchmark", read_secret(sockets), 0, 1, shape.spec.to_dict()))
    welcome, descriptors = channel.receive_within(SECONDS, waiting_for="the welcome", alive=lambda: None)
    assert isinstance(welcome, Welcome), welcome
    if descriptors:
        slab = map_memfd_slab(descriptors[0], welcome.num_bytes)
    else:
        slab = import_cuda_slab(welcome.uuid, welcome.handle, welcome.num_bytes)
    layout = shape.layout
    writer = ChunkWriter(ring_views(slab, layout), layout, ticks=shape.ticks, device=torch.device(device))
    channel.send(SelfTest(*writer.write_pattern(welcome.test_row)))
    sent = 0
    try:
        while True:
            received = channel.receive()
            if received is None:
                channel.wait(1.0)
            elif isinstance(received[0], Grant):
                grant, sent = received[0], sent + 1
                writer.rows["reward",].fill_(sent)
                writer.num_rows = shape.ticks
                writer.write(grant.row)
                writer.wait()
                channel.send(Commit(grant.seq, grant.row, agent_steps=0, env_frames=0, policy_version=0))
    except Disconnected:
        return


def _send_to_queue(kind: str, shape: ChunkShape, chunks: Any, go: Any, device: str) -> None:
    """Send a chunk for every permit, until terminated.

    A tensor in a queue is shared with the receiver, so each chunk needs its own memory.
    """
    torch.set_num_threads(1)
    slab = torch.zeros(shape.layout.num_bytes, dtype=torch.uint8, device=device)
    stage: Any = ring_views(slab, shape.layout)[: shape.ticks]
    sent = 0
    while True:
        go.acquire()
        sent += 1
        stage.get("reward").fill_(sent)
        chunks.put(_packed(kind, stage, shape))


def _packed(kind: str, stage: TensorDict, shape: ChunkShape) -> Any:
    if kind == "tensordict queue":
        return stage.clone()
    keys = {entry.name: entry.key for entry in shape.layout.fields}
    if kind == "pickle queue":
        return {
            name: stage.get(key).cpu().clone().numpy() for name, key in keys.items()
        }  # a thread of the queue pickles it later
    fresh = {}
    for name, key in keys.items():
        value = stage.get(key)
        fresh[name] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if not value.is_cuda:
            fresh[name].share_memory_()  # before the copy, because put() would copy once more
        fresh[name].copy_(value)
    return fresh


def _slab(shape: ChunkShape, device: torch.device) -> tuple[torch.Tensor, int | None]:
    num_bytes = shape.layout.num_bytes
    if device.type == "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device), None
    return create_memfd_slab(num_bytes)


def _start(target: Any, *arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _check(process: BaseProcess, end: float) -> None:
    if process.exitcode is not None:
        raise RuntimeError(f"the sender ended with exit code {process.exitcode}")
    if time.monotonic() > end:
        raise TimeoutError(f"no chunk from the sender for {SECONDS:.0f} s")


def _end(process: BaseProcess) -> None:
    process.join(timeout=0.5)
    if process.exitcode is None:
        process.terminate()
        process.join(timeout=10.0)
