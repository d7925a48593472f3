"""The checksum of a chunk: a sum of its bytes, weighted by their positions, that is the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

BLOCK_BYTES = 1 << 22  # a block needs 8 times as much memory while it is summed
_MODULUS = (1 << 31) - 1


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum over all bytes of the tensors, each times a weight that depends on its position.

    It detects rows that are swapped, only partly written or old. It waits for the device, so it is used only in the
    self-test and if `replay_buffer.checksum` is true.
    """
    import torch

    total = 0
    for order, tensor in enumerate(tensors, start=1):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        sums = torch.zeros((), dtype=torch.int64, device=flat.device)
        for start in range(0, flat.numel(), BLOCK_BYTES):
            block = flat[start : start + BLOCK_BYTES]
            weight = (torch.arange(start, start + block.numel(), device=flat.device) % 65_521) + order
            sums += (block.to(torch.int64) * weight).sum()
        total = (total * 31 + int(sums)) % _MODULUS
    return total
