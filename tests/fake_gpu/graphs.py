"""Graphs and random numbers of the fake GPU: a capture records operators, a replay runs them.

Random operators follow the seed and the offset of the CUDA generator, as they do on a GPU: a replay begins at the
offset that the generator has then and moves it on. A generator that is not registered with the graph is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fake_gpu import streams
from tests.fake_gpu.memory import poison_free_memory

Work = Callable[[], object]
_DRAW = 4  # CUDA's generators count in multiples of 4
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing (fake GPU: {})"


def _address(generator: torch.Generator) -> int:
    """Return what is the same for all objects of Python that stand for one generator."""
    return generator._cdata  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Registered:
    """A generator that draws in a graph. Two objects of Python may stand for one generator; its address is the same."""

    generator: torch.Generator
    drawn: int = 0  # by how much one replay moves the offset
    seed: int = 0  # of the replay that runs
    offset: int = 0


@dataclass
class _Recording:
    """The operators of a captured graph, and the generators that it draws from."""

    work: list[Work] = field(default_factory=list)
    registered: dict[int, _Registered] = field(default_factory=dict)

    def draw(self, generator: torch.Generator) -> Callable[[], torch.Generator]:
        """Record that the graph draws; return a function that gives the CPU generator of this draw in each replay."""
        entry = self.registered.get(_address(generator))
        if entry is None:
            raise RuntimeError("fake GPU: a generator draws in a capture that it is not registered with")
        used, entry.drawn = entry.drawn, entry.drawn + _DRAW
        return lambda: _cpu_generator(entry.seed, entry.offset + used)


_recording: _Recording | None = None


def capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def submit(work: Work, device: torch.device) -> None:
    """Run the work in the order of the current stream, or add it to the graph that is being captured."""
    if capturing():
        if _recording is None:
            raise RuntimeError("fake GPU: this capture was not begun through torch.cuda.CUDAGraph")
        _recording.work.append(work)
    else:
        streams.submit(torch._C._cuda_getCurrentRawStream(device.index), device.index, work)


def check_host_may_wait(name: str) -> None:
    if capturing():
        raise RuntimeError(NOT_PERMITTED.format(f"{name} waits for the stream"))
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation (fake GPU: {name})")


def wait(device: torch.device) -> None:
    streams.finish(torch._C._cuda_getCurrentRawStream(device.index), device.index)


def default_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[device.index]


def draws(generator: torch.Generator) -> Callable[[], torch.Generator]:
    """Return a function that gives the CPU generator of this draw. The CUDA generator's seed and offset decide it."""
    if capturing():
        assert _recording is not None
        return _recording.draw(generator)
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + _DRAW)
    return lambda: _cpu_generator(seed, offset)


def _cpu_generator(seed: int, offset: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)


def call_random(func: Any, args: Any, kwargs: Any, draw: Callable[[], torch.Generator]) -> Any:
    """Run a random operator on the CPU with the numbers of this draw."""
    generator = draw()
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func(*args, **{**kwargs, "generator": generator})
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        torch.default_generator.set_state(state)


def _capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
    global _recording
    _original_begin(self, *args, **kwargs)
    generators = [*torch.cuda.default_generators, *getattr(self, "fake_generators", [])]
    registered = {_address(generator): _Registered(generator) for generator in generators}
    _recording = self.fake_recording = _Recording(registered=registered)


def _capture_end(self: Any) -> None:
    global _recording
    _recording = None
    _original_end(self)
    streams.finish_all()
    poison_free_memory()


def _register_generator(self: Any, generator: torch.Generator) -> None:
    """Register a generator. torch 2.14 does it by itself; older versions, which are supported, need the call."""
    self.fake_generators = [*getattr(self, "fake_generators", []), generator]


def _replay(self: Any) -> None:
    recording: _Recording = self.fake_recording
    drawing = [entry for entry in recording.registered.values() if entry.drawn]
    states = [(entry.generator.initial_seed(), entry.generator.get_offset()) for entry in drawing]
    for entry in drawing:
        entry.generator.set_offset(entry.generator.get_offset() + entry.drawn)
    _original_replay(self)

    def work() -> None:
        for entry, state in zip(drawing, states, strict=True):
            entry.seed, entry.offset = state
        for step in recording.work:
            step()

    device = torch.cuda.current_device()
    streams.submit(torch._C._cuda_getCurrentRawStream(device), device, work)


_original_begin = torch.cuda.CUDAGraph.capture_begin
_original_end = torch.cuda.CUDAGraph.capture_end
_original_replay = torch.cuda.CUDAGraph.replay


def install() -> None:
    """Let torch's graphs record and replay operators."""
    graph: Any = torch.cuda.CUDAGraph
    graph.capture_begin, graph.capture_end = _capture_begin, _capture_end
    graph.register_generator_state, graph.replay = _register_generator, _replay
