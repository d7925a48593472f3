"""Capture a function as one CUDA graph, so that the host launches all of its kernels at once."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")

WARM_UPS = 3  # runs before the capture: after two, everything that is made or compiled on first use exists


def capture(
    function: Callable[[], Result],
    device: torch.device,
    *,
    shared_process: bool,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Callable[[], object], Result]:
    """Run the function a few times, then capture one more run.

    Return a function that replays the graph, and that run's result.

    Replaying repeats the captured kernels on the stream that is current then. They read and write the addresses of the
    captured run, so a replay overwrites the tensors that were returned.

    shared_process: whether other code of this process, such as a simulator, uses the GPU as well. If so, its threads
    may allocate memory during the capture. If not, such an allocation is an error, and so is a recompilation; and the
    memory of the first runs is released before the capture, because a graph has memory of its own.
    generators: the generators that the function draws from, other than torch's global one.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    for generator in generators:
        graph.register_generator_state(generator)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    if not shared_process:
        stream.synchronize()
        torch.cuda.empty_cache()
    stance = contextlib.nullcontext() if shared_process else torch.compiler.set_stance("fail_on_recompile")
    error_mode = "thread_local" if shared_process else "global"
    gc.collect()
    gc.disable()  # a finaliser that frees GPU memory would break the capture
    try:
        with stance, torch.cuda.graph(graph, stream=stream, capture_error_mode=error_mode):
            result = function()
    finally:
        gc.enable()
    torch.cuda.current_stream(device).wait_stream(stream)
    return functools.partial(_replay, graph, function), result


def _replay(graph: torch.cuda.CUDAGraph, _function: Callable[[], object]) -> None:
    """Replay the graph. The caller keeps the function, and with it the memory that the graph reads and writes."""
    graph.replay()
