"""Acting weights out of the learner: packed between two steps, sent when the copy is done, newest only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from shared.weights import acting_tensors, flat_bytes, flat_views, manifest_of, pack_header, publisher_socket


class Publisher:
    """Versions the acting weights and pushes them without waiting for anybody.

    On a GPU: pack into one flat buffer on the learner's stream, copy on a side stream into one of two pinned buffers,
    send once that copy's event has passed (`flush`). While both buffers are busy a publication is skipped.
    """

    def __init__(self, policy: nn.Module, *, socket_dir: str | Path, run_id: str, version: int = 0) -> None:
        self._tensors = acting_tensors(policy)
        self._sources = list(self._tensors.values())
        device = self._sources[0].device
        self._num_bytes = flat_bytes(self._sources)
        self._flat = torch.zeros(self._num_bytes, dtype=torch.uint8, device=device)
        self._views = flat_views(self._flat, self._sources)
        self._run_id, self._manifest = run_id, manifest_of(self._tensors)
        self._socket = publisher_socket(socket_dir)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free = (
            [torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)] if self._stream else []
        )
        self._in_flight: list[tuple[int, torch.Tensor, torch.cuda.Event]] = []
        self._read: torch.cuda.Event | None = None
        self.version = version
        self._owed = False  # a republication waits for a free buffer
        self.num_skipped = 0

    def publish(self) -> None:
        """Make a new version of the present weights and push it."""
        if self._stream is not None and not self._free:
            self.num_skipped += 1
            return
        self.version += 1
        self._pack()
        self._copy_out()

    def republish(self) -> None:
        """Push the last version again, as it was packed, for a collector that missed it."""
        self._owed = self.version > 0
        self.flush()

    def flush(self) -> None:
        """Send every packed version whose copy has arrived in pinned memory. Never waits."""
        while self._in_flight and self._in_flight[0][2].query():
            version, buffer, _ = self._in_flight.pop(0)
            self._send(version, buffer)
            self._free.append(buffer)
        if self._owed and (self._stream is None or self._free):
            self._owed = False
            self._copy_out()

    def close(self) -> None:
        self._socket.close(linger=0)

    @torch.no_grad()
    def _pack(self) -> None:
        if self._read is not None:
            torch.cuda.current_stream().wait_event(self._read)  # pack only over what has been read
        torch._foreach_copy_(self._views, self._sources)  # pyright: ignore[reportPrivateImportUsage]

    def _copy_out(self) -> None:
        """The flat buffer to the socket: at once on the CPU, by way of pinned memory from a GPU."""
        if self._stream is None:
            self._send(self.version, self._flat)
            return
        buffer, event = self._free.pop(0), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            buffer.copy_(self._flat, non_blocking=True)
            event.record()
        self._read = event
        self._in_flight.append((self.version, buffer, event))

    def _send(self, version: int, buffer: torch.Tensor) -> None:
        header = pack_header(run_id=self._run_id, version=version, manifest=self._manifest, num_bytes=self._num_bytes)
        self._socket.send(header + buffer.numpy().tobytes())
