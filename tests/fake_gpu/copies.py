"""Copies between the host and fake GPUs, with CUDA's rules for pinned memory, waiting and capture."""

from __future__ import annotations

import torch

from tests.fake_gpu import streams
from tests.fake_gpu.graphs import NOT_PERMITTED, capturing, check_host_may_wait, submit, wait
from tests.fake_gpu.memory import alias


def _deferred_copy(to: torch.Tensor, source: torch.Tensor, device: torch.device, *, waits: bool) -> None:
    """Copy in the order of the device's current stream. Exactly one of the tensors is on the host."""
    to_cpu = alias(to) if to.is_cuda else to
    from_cpu = alias(source) if source.is_cuda else source
    host = source if to.is_cuda else to
    # torch converts on the source's side, and copies strided memory of the host, through unpinned memory.
    direct = host.is_contiguous() and (source.is_cuda or to.dtype == source.dtype)
    pinned = host.is_pinned() and direct
    streams.count_bytes(to_device=to.is_cuda, number=host.numel() * host.element_size())
    if capturing() and not pinned:
        raise RuntimeError(NOT_PERMITTED.format("a copy from or to unpinned host memory"))
    if waits or not pinned:
        if to.is_cuda and not waits:  # CUDA reads unpinned memory before the call returns
            from_cpu = from_cpu.clone()
        else:
            check_host_may_wait("a blocking copy")
            waits = True
    submit(lambda: _plain_copy(to_cpu, from_cpu, host), device)
    if waits:
        wait(device)


def _plain_copy(to: torch.Tensor, source: torch.Tensor, _host: torch.Tensor) -> None:
    """Copy. The host tensor is an argument so that its pinned memory lives until the copy is done, as torch ensures."""
    to.copy_(source)


def _copy_between_devices(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy on the current stream of the source's device; the other device's current stream waits before and after."""
    to_cpu, from_cpu = alias(to), alias(source)
    from_device, to_device = source.device.index, to.device.index
    from_stream, to_stream = (torch._C._cuda_getCurrentRawStream(index) for index in (from_device, to_device))
    streams.join(from_stream, from_device, to_stream, to_device)
    streams.submit(from_stream, from_device, lambda: to_cpu.copy_(from_cpu))
    streams.join(to_stream, to_device, from_stream, from_device)


def copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if to.is_cuda and source.is_cuda:
        if to.device == source.device:
            to_cpu, from_cpu = alias(to), alias(source)
            submit(lambda: to_cpu.copy_(from_cpu), to.device)
        else:
            _copy_between_devices(to, source)
    elif source.is_cuda or source.dim() > 0 or source.is_pinned():
        _deferred_copy(to, source, to.device if to.is_cuda else source.device, waits=not non_blocking)
    else:  # a number of the host
        number, to_cpu = source.clone(), alias(to)
        if capturing() or not non_blocking:
            check_host_may_wait("a blocking copy")
        submit(lambda: to_cpu.copy_(number), to.device)
    return to


def to_copy(
    source: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    target = torch.device(device) if device is not None else source.device
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    shape = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    shape = torch.ops.aten._to_copy.default(shape, dtype=dtype, memory_format=memory_format)
    pinned = bool(pin_memory) or (non_blocking and source.is_cuda and target.type == "cpu")
    new = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=target, pin_memory=pinned)
    if source.dtype == new.dtype or source.is_cuda == new.is_cuda:
        return copy_(new, source, non_blocking)
    # Between host and device torch converts on the source's side first.
    converted = source.to(new.dtype) if not source.is_cuda else to_copy(source, dtype=new.dtype)
    return copy_(new, converted, non_blocking)
