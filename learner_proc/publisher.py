"""Sends the acting weights to the collector.

They are packed between two gradient steps and sent once they have been copied to the host. The collector receives only
the newest version.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from shared.logs import LimitedLog
from shared.socket_folder import obtain_secret
from shared.weights import (
    acting_tensors,
    endpoint,
    flat_bytes,
    flat_views,
    manifest_of,
    pack_header,
    publisher_socket,
)

REPUBLISH_S = 0.2  # time between two attempts to send a version that the collector has missed
NOT_FINITE, GOOD = 0, 1  # the state of packed weights; 2: they are finite, but the last step was skipped


class Publisher:
    """Numbers the versions of the acting weights and sends them without ever waiting.

    On a GPU: pack into one flat buffer on the learner's stream, copy on a side stream into one of two pinned buffers,
    and send once that copy's event has passed (`flush`). While both buffers are busy, a publication is skipped.

    Weights that are not finite, and those after a step that was skipped, are not sent: the version then carries the
    last weights that were sent, so that a collector that waits for it goes on. This is found on the device, by a byte
    that travels behind the weights, so the learner does not wait for it.

    It also knows which version the collector has. ZeroMQ drops a message to a collector that has not subscribed yet, so
    a version is sent again until a commit shows that the collector acts with it.
    """

    def __init__(self, policy: nn.Module, *, socket_dir: str | Path, run_id: str, version: int = 0) -> None:
        """version: the version published last before a resume; 0 in a new run."""
        self._tensors = acting_tensors(policy)
        self._sources = list(self._tensors.values())
        device = self._sources[0].device
        self._num_bytes = flat_bytes(self._sources)
        # The last byte is the state of the weights.
        self._flat = torch.zeros(self._num_bytes + 1, dtype=torch.uint8, device=device)
        self._views = flat_views(self._flat[: self._num_bytes], self._sources)
        self._floats = [view for view in self._views if view.is_floating_point()]
        self._good = b""  # the newest weights that could be sent
        self._limited = LimitedLog()
        self._run_id, self._manifest = run_id, manifest_of(self._tensors)
        self._endpoint, self._secret = endpoint(socket_dir), obtain_secret(socket_dir)
        self._socket = publisher_socket(socket_dir)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free = (
            [torch.empty(len(self._flat), dtype=torch.uint8, pin_memory=True) for _ in range(2)] if self._stream else []
        )
        self._copying: list[tuple[int, torch.Tensor, torch.cuda.Event]] = []
        self._read: torch.cuda.Event | None = None  # passed once the flat buffer has been copied
        self._owed = False  # a republication waits for a free buffer
        self._sent_at = 0.0  # when a version was last published or sent again, time.monotonic() seconds
        self._collector = 0  # number of the collector that streams now
        self._adopted = 0  # version that this collector acts with
        self._fault = False  # weights that are not finite were not sent
        self.version = version
        self.published_step = -1  # gradient step at which this process last published
        self.num_skipped = 0

    def publish(self, *, step: int, skipped: torch.Tensor | None = None) -> None:
        """Send the present weights, those after `step` gradient steps, as a new version.

        skipped: whether the last step was skipped, a number () on the device; None before the first step.
        """
        if self._stream is not None and not self._free:
            self.num_skipped += 1
            return
        self.version += 1
        self.published_step, self._sent_at = step, time.monotonic()
        self._pack(skipped)
        self._copy_out()

    def republish(self) -> None:
        """Send the last version again, exactly as it was packed."""
        self._owed = self.version > 0
        self.flush()

    def flush(self) -> None:
        """Send every packed version whose copy has arrived in pinned memory. Never waits."""
        while self._copying and self._copying[0][2].query():
            version, buffer, _ = self._copying.pop(0)
            self._send(version, buffer)
            self._free.append(buffer)
        if self._owed and (self._stream is None or self._free):
            self._owed = False
            self._copy_out()

    def collector_streams(self, number: int) -> None:
        """Record which collector streams now, counted from 1. Send the last version to a collector that is new.

        A new collector has no weights, even if the previous collector had the newest.
        """
        if number != self._collector:
            self._collector, self._adopted = number, 0
            self.republish()

    def collector_has(self, version: int) -> None:
        """Record the version that the collector acted with in the chunk that it committed last."""
        self._adopted = version

    def republish_if_missed(self) -> None:
        """Send the last version again if the collector does not act with it and REPUBLISH_S have passed."""
        if self._adopted < self.version and time.monotonic() - self._sent_at > REPUBLISH_S:
            self._sent_at = time.monotonic()
            self.republish()

    def take_fault(self) -> bool:
        """Return whether weights since the last call were not sent, because a number in them was not finite."""
        fault, self._fault = self._fault, False
        return fault

    def bind_again(self) -> None:
        """Bind the endpoint once more, because its file is gone. Collectors that are connected stay connected."""
        self._socket.bind(self._endpoint)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)

    @torch.no_grad()
    def _pack(self, skipped: torch.Tensor | None) -> None:
        """Copy the present weights into the flat buffer, and note there whether they may be sent."""
        if self._read is not None:
            torch.cuda.current_stream().wait_event(self._read)  # overwrite the buffer only after it has been copied
        torch._foreach_copy_(self._views, self._sources)  # pyright: ignore[reportPrivateImportUsage]
        largest = torch._foreach_norm(self._floats, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        healthy = torch.stack([norm.float() for norm in largest]).isfinite().all()
        # Only numbers of Python and tensors of the device: a tensor on the host would be a copy that waits.
        self._flat[-1].copy_(healthy if skipped is None else healthy * (1 + (skipped > 0).byte()))

    def _copy_out(self) -> None:
        """Send the flat buffer: at once from the CPU, through pinned memory from a GPU."""
        if self._stream is None:
            self._send(self.version, self._flat)
            return
        buffer, event = self._free.pop(0), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            buffer.copy_(self._flat, non_blocking=True)
            event.record()
        self._read = event
        self._copying.append((self.version, buffer, event))

    def _send(self, version: int, buffer: torch.Tensor) -> None:
        """Send one version from host memory, or the last weights that were sent if these may not be sent."""
        content = buffer.numpy()
        if content[-1] == GOOD:
            self._good = content[:-1].tobytes()
        if content[-1] == NOT_FINITE:
            self._fault = True
            self._limited.warning("weights that are not finite are not sent", version=version)
        if not self._good:
            return
        header = pack_header(
            run_id=self._run_id,
            secret=self._secret,
            version=version,
            manifest=self._manifest,
            num_bytes=self._num_bytes,
        )
        self._socket.send(header + self._good)
