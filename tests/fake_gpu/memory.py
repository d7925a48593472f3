"""Tensors of the CPU that share the memory of a fake GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

POISON = 0xFF  # not a number in every floating-point type, -1 in every signed integer
_CACHE_LIMIT = 50_000
_aliases: dict[tuple[Any, ...], torch.Tensor] = {}


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor that shares the memory of a tensor on a fake GPU."""
    pointer = tensor.data_ptr()
    size, stride = tensor.shape, tensor.stride()
    key = (pointer, tensor.dtype, size, stride)
    found = _aliases.get(key)
    if found is not None:
        return found
    if tensor.numel() == 0:
        return torch.empty_strided(size, stride, dtype=tensor.dtype)
    span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    buffer = (ctypes.c_char * (span * tensor.element_size())).from_address(pointer)
    new = torch.frombuffer(buffer, dtype=tensor.dtype, count=span).as_strided(size, stride)
    if len(_aliases) > _CACHE_LIMIT:
        _aliases.clear()
    _aliases[key] = new
    return new


def to_cpu(value: Any, seen: list[torch.Tensor]) -> Any:
    """Return the value with every CUDA tensor replaced by its CPU alias; collect the tensors that were seen."""
    if isinstance(value, torch.Tensor):
        seen.append(value)
        if value.is_cuda:
            return alias(value)
        # A kernel takes a number from the host when it is launched, not when it runs.
        return value.clone() if value.dim() == 0 else value
    if isinstance(value, (list, tuple)):
        return [to_cpu(item, seen) for item in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list):
        return [to_meta(item) for item in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, (list, tuple)) else []


def poison_free_memory() -> None:
    """Fill the memory that torch's allocator holds and no tensor uses. Code that still reads it computes nonsense."""
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                ctypes.memset(address, POISON, block["size"])
            address += block["size"]
