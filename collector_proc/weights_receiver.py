"""The receiving end of the weights: copies the newest published version into the acting policy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import nn

from shared.logs import LimitedLog
from shared.socket_folder import read_secret
from shared.weights import (
    ForeignWeightsError,
    WeightsError,
    acting_tensors,
    endpoint,
    flat_bytes,
    flat_views,
    manifest_of,
    subscriber_socket,
    unpack_frame,
)

RECONNECT_S = 2.0  # least time between two connections to the endpoint


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
        self._run_id, self._manifest, self._secret = run_id, manifest_of(tensors), read_secret(socket_dir)
        self._endpoint, self._log = endpoint(socket_dir), LimitedLog()
        self._reconnected_at = time.monotonic()
        self._socket = subscriber_socket(socket_dir, max_bytes=self._num_bytes)
        self.version = 0  # 0: no weights have been adopted yet
        self.num_refused = 0
        self.last_refusal = ""  # why the last unsuitable message was dropped

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
        return frame is not None and self.adopt_frame(frame.buffer)

    def adopt_frame(self, frame: memoryview) -> bool:
        """Copy the weights of one message into the policy. Return False if they are not newer, or do not fit."""
        try:
            version, raw = unpack_frame(
                frame,
                run_id=self._run_id,
                secret=self._secret,
                manifest=self._manifest,
                num_bytes=self._num_bytes,
            )
        except WeightsError as error:
            self._refuse(error)
            return False
        if version <= self.version:
            return False
        self._host.numpy()[:] = np.frombuffer(raw, np.uint8)
        self._copy_to_policy()
        self.version = version
        return True

    def reconnect_if_silent(self) -> None:
        """Connect again if RECONNECT_S have passed since the last time. Call it while weights are missing.

        The endpoint may have been taken over by another process when this one connected. The learner notices that and
        binds the endpoint again, but existing connections do not change.
        """
        if time.monotonic() - self._reconnected_at > RECONNECT_S:
            self._reconnected_at = time.monotonic()
            self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)

    def _refuse(self, error: WeightsError) -> None:
        """Count a message that was dropped, and log the reason at a limited rate."""
        self.num_refused += 1
        self.last_refusal = str(error)
        self._log.warning("unsuitable weights dropped", reason=self.last_refusal)
        if isinstance(error, ForeignWeightsError):
            self._log.warning("another process has bound the endpoint of the weights", endpoint=self._endpoint)
            self.reconnect_if_silent()

    @torch.no_grad()
    def _copy_to_policy(self) -> None:
        if self._copied is not None:
            self._flat.copy_(self._host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._flat.device))
        torch._foreach_copy_(self._targets, self._views)  # pyright: ignore[reportPrivateImportUsage]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
