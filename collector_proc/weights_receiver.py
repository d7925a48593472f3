"""The receiving end of the weights: copies the newest published version into the acting policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import zmq
from torch import nn

from shared.weights import (
    WeightsError,
    acting_tensors,
    flat_bytes,
    flat_views,
    manifest_of,
    subscriber_socket,
    unpack_frame,
)


class WeightsReceiver:
    """Keeps a policy at the newest published weights.

    The weights are copied into the existing parameters, so that compiled code and CUDA graphs stay valid.
    """

    def __init__(self, policy: nn.Module, *, socket_dir: str | Path, run_id: str) -> None:
        tensors = acting_tensors(policy)
        self._targets = list(tensors.values())
        self._num_bytes = flat_bytes(self._targets)
        device = self._targets[0].device
        cuda = device.type == "cuda"
        # Page-locked host memory lets the host continue while the GPU copies from it.
        self._host = torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._flat = torch.zeros_like(self._host, device=device) if cuda else self._host
        self._copied = torch.cuda.Event() if cuda else None  # passed once the GPU no longer reads the host memory
        self._views = flat_views(self._flat, self._targets)
        self._run_id, self._manifest = run_id, manifest_of(tensors)
        self._socket = subscriber_socket(socket_dir, max_bytes=self._num_bytes)
        self.version = 0  # 0: no weights have been adopted yet
        self.num_refused = 0

    def adopt(self) -> bool:
        """Copy the newest waiting weights into the policy, and return whether there were any. This never blocks.

        Work that is queued on the current stream after this call uses the new weights.
        """
        if self._copied is not None and not self._copied.query():
            return False  # the GPU still reads the previous weights from the host memory
        frame = None
        while True:  # receive until nothing waits: after a mere poll, zmq would deliver an older message
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
        if frame is None:
            return False
        try:
            version, raw = unpack_frame(
                frame.buffer, run_id=self._run_id, manifest=self._manifest, num_bytes=self._num_bytes
            )
        except WeightsError:
            self.num_refused += 1
            return False
        if version <= self.version:
            return False
        self._host.numpy()[:] = np.frombuffer(raw, np.uint8)
        self._copy_to_policy()
        self.version = version
        return True

    @torch.no_grad()
    def _copy_to_policy(self) -> None:
        if self._copied is not None:
            self._flat.copy_(self._host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._flat.device))
        torch._foreach_copy_(self._targets, self._views)  # pyright: ignore[reportPrivateImportUsage]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
