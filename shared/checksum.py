"""A chunk's checksum: a position-weighted sum of its bytes, the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_MODULUS = (1 << 31) - 1


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum over all tensors of byte * weight, the weight depending on its place; detects swapped, torn and stale rows.

    Waits for the device; used at start-up and where `replay_buffer.checksum` is on.
    """
    import torch

    total = 0
    for order, tensor in enumerate(tensors, start=1):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        weight = (torch.arange(flat.numel(), device=flat.device) % 65_521) + order
        total = (total * 31 + int((flat.to(torch.int64) * weight).sum())) % _MODULUS
    return total
