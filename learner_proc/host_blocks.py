"""Brings large tensors from the GPU to the host, through two blocks of pinned memory and on a stream of its own.

    side stream   | copy 0 -> block A | copy 1 -> block B |           | copy 2 -> block A | ...
    host                              | write A to the disk           | write B           | ...

While the host works on one block, the next one is copied. The copies wait for the work that was queued on the current
stream before, and that stream does not wait for them. In host memory the same code copies directly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

NUM_BLOCKS = 2
BLOCK_BYTES = 64 * 1024 * 1024


class HostBlocks:
    """Reads the bytes of tensors in blocks of host memory.

    device: where the tensors are; some of them may be in host memory. on_block: called for each block that has arrived,
    to report progress. The blocks are allocated at the first use and kept.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        block_bytes: int = BLOCK_BYTES,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        self._block_bytes, self._on_block = block_bytes, on_block
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks: list[Tensor] = []

    def read(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the bytes of contiguous tensors in their order, (n,) uint8. A block is valid until the next is taken.

        Do not write to the tensors before the last block has been taken.
        """
        if not self._blocks:
            pinned = self._stream is not None
            self._blocks = [
                torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(NUM_BLOCKS)
            ]
        copying: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        for turn, pieces in enumerate(_pieces_of_blocks(tensors, self._block_bytes)):
            if len(copying) == NUM_BLOCKS:
                yield self._arrived(*copying.popleft())
            copying.append(self._start(self._blocks[turn % NUM_BLOCKS], pieces))
        while copying:
            yield self._arrived(*copying.popleft())

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return a copy of every tensor in plain host memory."""
        flat = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)
        end = 0
        for block in self.read(tensor.detach().contiguous() for tensor in tensors):
            flat[end : end + len(block)] = block
            end += len(block)
        parts = flat.split([tensor.nbytes for tensor in tensors])
        # A part may begin at any byte; a clone begins at an address that suits its type.
        return [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]

    def _start(self, block: Tensor, pieces: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start to copy the pieces into a block; return its used part and the event that passes when they are there."""
        used = block[: sum(map(len, pieces))]
        targets = used.split([len(piece) for piece in pieces])
        if self._stream is None:
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece)
            return used, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece, non_blocking=True)
                if piece.is_cuda:
                    piece.record_stream(self._stream)  # it may be a temporary tensor
            event = torch.cuda.Event(blocking=True)
            event.record()
        return used, event

    def _arrived(self, used: Tensor, event: torch.cuda.Event | None) -> Tensor:
        """Wait until a block's copies are there; report progress and return it."""
        if event is not None:
            event.synchronize()
        self._on_block()
        return used


def _pieces_of_blocks(tensors: Iterable[Tensor], block_bytes: int) -> Iterator[list[Tensor]]:
    """Yield, for each block, flat byte views that fill it; only the last block may have room left."""
    pieces: list[Tensor] = []
    room = block_bytes
    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        while len(flat) > 0:
            pieces.append(flat[:room])
            flat, room = flat[room:], room - len(pieces[-1])
            if room == 0:
                yield pieces
                pieces, room = [], block_bytes
    if pieces:
        yield pieces
