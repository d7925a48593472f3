"""The acting side of the policy: one belief per environment, weights adopted in place between ticks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from collector_proc.graphed_policy import GraphedPolicy
from collector_proc.simulators.base import Arrival
from shared.config import CollectorSettings, NetworkSettings
from shared.model.policy import Policy
from shared.stream import StreamSpec, evaluation_columns
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
    """Keeps a policy's parameters at the newest published version, copied in place so that compiled code stays valid."""

    def __init__(self, policy: Policy, *, socket_dir: str | Path, run_id: str) -> None:
        tensors = acting_tensors(policy)
        self._targets = list(tensors.values())
        self._num_bytes = flat_bytes(self._targets)
        device = self._targets[0].device
        cuda = device.type == "cuda"
        # weights pass through page-locked memory, so that the host need not wait for the GPU to take them
        self._host = torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._flat = torch.zeros_like(self._host, device=device) if cuda else self._host
        self._taken = torch.cuda.Event() if cuda else None  # the GPU has what lies in the page-locked memory
        self._views = flat_views(self._flat, self._targets)
        self._run_id, self._manifest = run_id, manifest_of(tensors)
        self._socket = subscriber_socket(socket_dir, max_bytes=self._num_bytes)
        self.version = 0  # 0: nothing adopted yet
        self.num_refused = 0

    def adopt(self) -> bool:
        """Copy the newest waiting weights into the policy; True if there were any. Never waits.

        The policy has them from here on in the order of the current stream.
        """
        if self._taken is not None and not self._taken.query():
            return False  # the last ones are still on their way
        frame = None
        while True:  # receive until nothing waits: a poll alone would pin an old message
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
        with torch.no_grad():
            if self._taken is not None:
                self._flat.copy_(self._host, non_blocking=True)
                self._taken.record(torch.cuda.current_stream(self._flat.device))
            torch._foreach_copy_(self._targets, self._views)  # pyright: ignore[reportPrivateImportUsage]
        self.version = version
        return True

    def close(self) -> None:
        self._socket.close(linger=0)


class Actor:
    """Chooses the actions of all E environments and remembers what it needs for the next tick.

    Of the columns, `eval_envs` act without noise, spread evenly. Until weights have been adopted, and for `random_ticks`, every action
    is uniform random.
    """

    def __init__(
        self,
        spec: StreamSpec,
        networks: NetworkSettings,
        collector: CollectorSettings,
        *,
        device: torch.device,
        seed: int,
        random_ticks: int,
    ) -> None:
        self.policy = Policy(spec, networks).to(device).requires_grad_(False)
        self.device, self.random_ticks = device, random_ticks
        self._shape = (spec.num_envs, spec.action_dim)
        self.evaluation = torch.zeros(spec.num_envs, dtype=torch.bool, device=device)
        columns = evaluation_columns(spec.num_envs, collector.eval_envs)
        self.evaluation[columns] = True
        self.belief = self.policy.initial_belief(spec.num_envs)
        self._act = partial(
            self.policy.act,
            noise_std=networks.exploration_noise,
            evaluation=torch.tensor(columns, dtype=torch.int64, device=device),
            eval_action=collector.eval_action,
        )
        graphed = device.type == "cuda" and collector.cudagraphs
        self._graphed = GraphedPolicy(self._act, spec, self.belief) if graphed else None
        self._generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)

    @torch.no_grad()
    def act(self, arrival: Arrival, prev_action: Tensor, *, version: int) -> Tensor:
        """The executed action (E, A) in [-1, 1] that answers an arrival, valid until the next call.

        prev_action: as recorded in the arrival's row.
        """
        if self.random_ticks > 0 or version == 0:
            self.random_ticks -= 1
            return torch.rand(self._shape, device=self.device, generator=self._generator) * 2 - 1
        obs, reset = arrival.obs, arrival.is_first
        if arrival.acting_obs is not None:  # the simulator reset inside step: what is acted on is a fresh episode
            obs, reset = arrival.acting_obs, arrival.is_first | arrival.is_last
        if self._graphed is not None:
            return self._graphed(obs, prev_action, reset)
        obs = {name: entry.to(self.device, non_blocking=True) for name, entry in obs.items()}
        action, self.belief = self._act(obs, self.belief, prev_action, reset.to(self.device))
        return action
