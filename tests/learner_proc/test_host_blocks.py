"""Tensors reach the host unchanged, block by block, and every block is valid while it is worked on."""

from __future__ import annotations

import pytest
import torch

from learner_proc.host_blocks import HostBlocks
from learner_proc.snapshot import on_host

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def mixed(device: torch.device) -> list[torch.Tensor]:
    """Tensors whose sizes fit no block: some are empty, scalars, or larger than a block."""
    return [
        torch.arange(7, dtype=torch.uint8, device=device),
        torch.tensor(3.5, device=device),
        torch.empty(0, 4, device=device),
        torch.arange(40, dtype=torch.int64, device=device).view(5, 8),
        torch.tensor([True, False, True], device=device),
        torch.arange(6.0, device=device).view(2, 3).t(),
    ]


def as_bytes(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_bytes", [1, 16, 50, 320, 4096])
def test_the_blocks_hold_the_bytes_of_the_tensors_in_their_order(device, block_bytes):
    arrived, read = [], []
    blocks = HostBlocks(device, block_bytes=block_bytes, on_block=lambda: arrived.append(1))
    tensors = [tensor.contiguous() for tensor in mixed(device)]
    for _ in range(2):  # the blocks are used again
        read = [bytes(block.numpy()) for block in blocks.read(tensors)]
        assert b"".join(read) == as_bytes(tensors)
        assert {len(block) for block in read[:-1]} <= {block_bytes}, "only the last block is not full"
    assert len(arrived) == 2 * len(read)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_on_the_host_equal_their_tensors_and_share_no_memory(device):
    tensors = mixed(device)
    copies = HostBlocks(device, block_bytes=50).to_host(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.device == CPU and copy.dtype == tensor.dtype and torch.equal(copy, tensor.cpu())
    assert len({copy.untyped_storage().data_ptr() for copy in copies if copy.numel()}) == 5


def test_without_tensors_there_is_no_block():
    blocks = HostBlocks(CPU, block_bytes=8)
    assert list(blocks.read([])) == [] and blocks.to_host([]) == []


def test_a_block_stays_as_it_is_until_the_next_one_is_taken():
    data = torch.arange(60, dtype=torch.uint8)
    for number, block in enumerate(HostBlocks(CPU, block_bytes=10).read([data])):
        assert block.tolist() == list(range(10 * number, 10 * number + 10))


def test_the_groups_of_a_learner_keep_their_names():
    groups = {"actor": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "critic": {"weight": torch.ones(4) * 7}}
    copied = on_host(groups, HostBlocks(CPU, block_bytes=10))
    assert [list(tensors) for tensors in copied.values()] == [["weight", "bias"], ["weight"]]
    assert torch.equal(copied["critic"]["weight"], groups["critic"]["weight"])
