"""The checksum of a chunk is summed in blocks, and depends on every byte and its place."""

from __future__ import annotations

import torch

from shared.checksum import BLOCK_BYTES, checksum


def _plain(tensors: list[torch.Tensor]) -> int:
    """Return the checksum as one sum over each whole tensor."""
    total = 0
    for order, tensor in enumerate(tensors, start=1):
        flat = tensor.view(torch.uint8).flatten().to(torch.int64)
        total = (total * 31 + int((flat * (torch.arange(len(flat)) % 65_521 + order)).sum())) % ((1 << 31) - 1)
    return total


def test_blocks_give_the_sum_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_bytes in (1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 12_345):
        tensors = [torch.randint(0, 256, (num_bytes,), generator=generator).to(torch.uint8), torch.arange(7)]
        assert checksum(tensors) == _plain(tensors)


def test_a_byte_that_moves_across_the_border_of_two_blocks_changes_the_sum() -> None:
    bytes_ = torch.zeros(BLOCK_BYTES + 1, dtype=torch.uint8)
    bytes_[BLOCK_BYTES - 1] = 9
    moved = bytes_.roll(1)
    assert checksum([bytes_]) != checksum([moved])
