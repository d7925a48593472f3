"""Counters of a CUDA device: launches, allocations, waits and copied bytes.

A fake GPU counts them itself (`tests/fake_gpu`). On a real one, kernels come from torch's profiler, and what only the
runtime knows is left out.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._C._autograd import DeviceType
from torch.cuda.memory import memory_stats

WHERE = ("device", "host")
PRODUCT_NAMES = ("gemm", "cutlass", "cublas", "nvjet", "splitK")  # in the names of a real GPU's matrix products


def fake_counter(name: str) -> int | None:
    """Return a counter of the fake GPU, or None if the device is a real one or does not count this."""
    # The libraries are loaded already, and a library of this name is found among them.
    for library in ("libcudart.so.13", "libcuda.so.1"):
        try:
            return ctypes.c_long.in_dll(ctypes.CDLL(library), f"fake_gpu_{name}").value
        except (OSError, ValueError):
            continue
    return None


def is_fake() -> bool:
    """Return whether the CUDA device is the fake one."""
    return fake_counter("launches") is not None


def device_name() -> str:
    """Return what the figures were counted on."""
    return "fake GPU" if is_fake() else torch.cuda.get_device_name(0)


def kernels() -> Counter[str]:
    """Return how many kernels the fake GPU has launched so far, by who wrote them. A captured kernel counts once."""
    names = {"pytorch": "launches", "triton": "driver_launches", "products": "products"}
    return Counter({kind: fake_counter(name) or 0 for kind, name in names.items()})


def count_kernels(call: Callable[[], Any]) -> Counter[str]:
    """Return the kernels that a call launches, by who wrote them: `pytorch`, `triton`, or a library of `products`."""
    if is_fake():
        before = kernels()
        call()
        torch.cuda.synchronize()
        after = kernels()
        return Counter({kind: after[kind] - before[kind] for kind in after})
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events() or []:
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem"):
            found[kernel_kind(event.name)] += 1
    return found


@contextmanager
def counted_captures() -> Iterator[list[Counter[str]]]:
    """Yield a list that gets the kernels of each CUDA graph that is captured meanwhile, on the fake GPU."""
    found: list[Counter[str]] = []
    graph = torch.cuda.CUDAGraph
    begin, end = graph.capture_begin, graph.capture_end

    def counted_begin(self: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        found.append(kernels())
        begin(self, *args, **kwargs)

    def counted_end(self: torch.cuda.CUDAGraph) -> None:
        end(self)
        before, after = found.pop(), kernels()
        found.append(Counter({kind: after[kind] - before[kind] for kind in after}))

    with patch.object(graph, "capture_begin", counted_begin), patch.object(graph, "capture_end", counted_end):
        yield found


def kernel_kind(name: str) -> str:
    """Return who wrote a kernel of this name."""
    if name.startswith("triton_"):
        return "triton"
    return "products" if any(part in name for part in PRODUCT_NAMES) else "pytorch"


def count_traffic(call: Callable[[], Any], *, calls: int) -> dict[str, float]:
    """Return what one call costs on average beside kernels: allocations, host synchronisations and copied bytes."""
    names = {
        "synchronisations": "synchronizations",
        "bytes_to_gpu": "bytes_to_device",
        "bytes_to_host": "bytes_to_host",
    }
    before, allocations = {key: fake_counter(name) for key, name in names.items()}, memory_stats()["num_device_alloc"]
    for _ in range(calls):
        call()
    costs = {"allocations": memory_stats()["num_device_alloc"] - allocations}
    for key, name in names.items():
        then, now = before[key], fake_counter(name)
        if then is not None and now is not None:
            costs[key] = now - then
    return {key: value / calls for key, value in costs.items()}


def memory_mb() -> dict[str, float]:
    """Return the peaks of GPU memory in MiB: what tensors use, and what torch has reserved for them."""
    return {
        "allocated_mb": torch.cuda.max_memory_allocated() >> 20,
        "reserved_mb": torch.cuda.max_memory_reserved() >> 20,
    }
