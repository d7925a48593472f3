"""The least time that a gradient step could take on this machine, computed from measured rates.

The matrix products of an uncompiled step are recorded, forward and backward. Each distinct product is then timed alone,
with the same shapes, strides and types; the sum is the floor of the products. Adam's memory traffic is added at the
bandwidth of a large copy: it reads parameter, gradient and two moments and writes parameter and moments, 28 bytes per
parameter. Elementwise operations count as zero, because they could be fused into the products.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

ADAM_BYTES = 28
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
BATCH_S = 0.01  # calls are repeated for at least this long between two readings of the clock
BATCHES = 3  # the fastest counts
MAX_CALLS = 200
CAPTURED_CALLS = 20


@dataclass(frozen=True)
class Operand:
    """The properties of a tensor on which a kernel's time depends."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        """Return noise in that layout."""
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return torch.randn(max(extent, 1), device=device).to(self.dtype).as_strided(self.shape, self.stride)


class ProductRecorder(TorchDispatchMode):
    """Counts every matrix product and convolution by operator and operands."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in flop_registry:
            self.products[func, _frozen(args), _frozen(tuple((kwargs or {}).items()))] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Floor:
    """The least time of a step. `flops` counts a multiplication and an addition as two."""

    flops: int
    products_s: float
    optimiser_s: float
    bandwidth_gb_s: float
    num_products: int
    num_shapes: int

    @property
    def seconds(self) -> float:
        """Return the floor of a step."""
        return self.products_s + self.optimiser_s

    def describe(self) -> dict[str, Any]:
        """Return the figures for a result file."""
        return {**vars(self), "floor_ms": 1e3 * self.seconds, "products_tflops": self.flops / self.products_s / 1e12}


def measure_floor(step: Callable[[], Any], *, num_params: int, device: torch.device, bandwidth: float) -> Floor:
    """Return the floor of one call of `step`, which must be uncompiled. Units: bandwidth in bytes per second."""
    with ProductRecorder() as recorder, FlopCounterMode(display=False) as counter:
        step()
    products_s = 0.0
    for (func, args, kwargs), count in recorder.products.items():
        products_s += count * seconds_per_call(_call(func, args, kwargs, device), device)
    return Floor(
        flops=counter.get_total_flops(),
        products_s=products_s,
        optimiser_s=num_params * ADAM_BYTES / bandwidth,
        bandwidth_gb_s=bandwidth / 1e9,
        num_products=recorder.products.total(),
        num_shapes=len(recorder.products),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call(lambda: target.copy_(source), device)


def square_matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the rate of one large square product, which is the best rate of this machine."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (Operand((size, size), (size, 1), dtype).make(device) for _ in range(2))
    return 2 * size**3 / seconds_per_call(lambda: torch.mm(a, b), device) / 1e12


def seconds_per_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call in the fastest of a few batches; on a GPU inside a graph, without launch costs.

    Units: CPU seconds with one thread, because other processes do not lengthen them; wall seconds with several.
    """
    if device.type == "cuda":
        return _captured_seconds(call)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    num_calls = max(1, min(MAX_CALLS, int(BATCH_S / max(clock() - started, 1e-6))))
    batches = []
    for _ in range(BATCHES):
        started = clock()
        for _ in range(num_calls):
            call()
        batches.append((clock() - started) / num_calls)
    return min(batches)


def _captured_seconds(call: Callable[[], Any]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # workspaces must be allocated before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CAPTURED_CALLS):
            call()
    batches = []
    for _ in range(BATCHES + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        batches.append(begin.elapsed_time(end) / 1e3 / CAPTURED_CALLS)
    return min(batches)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Operand):
        return value.make(device)
    return [_thawed(part, device) for part in value] if isinstance(value, tuple) else value


def _call(func: Any, args: tuple, kwargs: tuple, device: torch.device) -> Callable[[], Any]:
    made, named = _thawed(args, device), {name: _thawed(value, device) for name, value in kwargs}
    return lambda: func(*made, **named)
