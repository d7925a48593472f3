"""Granted rows in, finished chunks out: rows are gathered beside the simulator, then copied field by field into the ring."""

from __future__ import annotations

import time
from collections import deque

import torch
from tensordict import TensorDict
from torch import Tensor

from collector_proc.simulators.base import Arrival
from shared.checksum import checksum
from shared.stream import Layout, StreamSpec


class ChunkWriter:
    """Gathers K rows on the acting device and writes them into the slab with one contiguous copy per field.

    ring: TensorDict [T_cap] of views of the learner's slab (`shared.stream.ring_views`).
    """

    def __init__(self, ring: TensorDict, layout: Layout, *, ticks: int, device: torch.device) -> None:
        self._ring, self.ticks = ring, ticks
        self._keys = [entry.key for entry in layout.fields]
        self._stage = {
            key: torch.zeros((ticks, *layout.shape(entry)[1:]), dtype=getattr(torch, entry.dtype), device=device)
            for key, entry in zip(self._keys, layout.fields, strict=True)
        }
        self._devices = {d for d in (device, ring.device) if d is not None and d.type == "cuda"}
        self.num_rows = 0  # gathered so far

    @property
    def full(self) -> bool:
        return self.num_rows == self.ticks

    def add(self, arrival: Arrival, action: Tensor, policy_version: int) -> None:
        """Gather one row. action: the executed action that led to the arrival, 0 at `is_first`."""
        k = self.num_rows
        for name, entry in arrival.obs.items():
            self._stage["obs", name][k].copy_(entry, non_blocking=True)
        row = {"action": action, "reward": arrival.reward, "is_first": arrival.is_first}
        row |= {"is_last": arrival.is_last, "is_terminal": arrival.is_terminal}
        for name, entry in row.items():
            self._stage[name,][k].copy_(entry, non_blocking=True)
        self._stage["policy_version",][k].fill_(policy_version)
        self.num_rows += 1

    def write(self, row: int) -> None:
        """Copy the gathered chunk to ring rows row..row+K and wait until it has arrived there."""
        assert self.full, (self.num_rows, self.ticks)
        for key in self._keys:
            self._ring[key][row : row + self.ticks].copy_(self._stage[key], non_blocking=True)
        for device in self._devices:  # once per chunk: what a commit names must lie in the replay
            torch.cuda.current_stream(device).synchronize()
        self.num_rows = 0

    def checksum(self) -> int:
        """Of the chunk as gathered, to be compared with what the learner finds in its memory."""
        return checksum(self._stage[key] for key in self._keys)

    def write_pattern(self, row: int) -> tuple[int, int, float]:
        """Fill the stage with a pattern and write it like a chunk; returns checksum, bytes and seconds of one write."""
        num_bytes = 0
        for entry in self._stage.values():
            flat = entry.view(-1).view(torch.uint8)
            pattern = torch.arange(flat.numel(), device=flat.device)
            flat.copy_(pattern % 2 if entry.dtype == torch.bool else pattern % 251)
            num_bytes += flat.numel()
        expected, seconds = self.checksum(), []
        for _ in range(3):  # the first write pays for page faults and mappings
            started, self.num_rows = time.perf_counter(), self.ticks
            self.write(row)
            seconds.append(time.perf_counter() - started)
        return expected, num_bytes, min(seconds)


class EpisodeTracker:
    """Returns, lengths and kinds of finished episodes, summed on the device and read once per chunk.

    resets_inside: the simulator resets inside `step`, so that every row, `is_first` ones too, is an agent step.
    """

    def __init__(self, spec: StreamSpec, *, ticks: int, evaluation: Tensor, resets_inside: bool) -> None:
        device = evaluation.device
        self._evaluation, self._resets_inside = evaluation, resets_inside
        self._return = torch.zeros(spec.num_envs, device=device)
        self._length = torch.zeros(spec.num_envs, dtype=torch.int32, device=device)
        self._random = torch.ones(spec.num_envs, dtype=torch.bool, device=device)
        self._done = torch.zeros(ticks, 3, spec.num_envs, device=device)  # return, length, kind + 1 where finished
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._tick = 0
        self._waiting: deque[tuple[float, int, int]] = deque()

    def add(self, arrival: Arrival, *, random: bool) -> None:
        """random: the actions that led to this arrival were drawn without weights."""
        device = self._return.device
        first, last = arrival.is_first.to(device), arrival.is_last.to(device)
        step = torch.ones_like(first) if self._resets_inside else ~first
        self._return = torch.where(first, 0.0, self._return) + arrival.reward.to(device)
        self._length = torch.where(first, 0, self._length) + step
        self._random = torch.where(first, torch.zeros_like(self._random), self._random) | (step & random)
        kind = torch.where(self._random, 3, torch.where(self._evaluation, 2, 1))
        done = self._done[self._tick]
        done[0].copy_(self._return)
        done[1].copy_(self._length)
        done[2].copy_(torch.where(last, kind, 0))
        self._steps += step.sum()
        self._tick += 1

    def take(self, maximum: int) -> tuple[list[float], list[int], list[int], int]:
        """Returns, lengths and kinds (indices of EPISODE_KINDS) of at most `maximum` finished episodes, and the agent
        steps since the last call. Waits for the device."""
        done, self._tick = self._done.cpu(), 0
        ticks, envs = done[:, 2].nonzero(as_tuple=True)
        rows = done[ticks, :, envs].tolist()
        self._waiting.extend((value, int(length), int(kind) - 1) for value, length, kind in rows)
        self._done.zero_()
        steps = int(self._steps)
        self._steps.zero_()
        taken = [self._waiting.popleft() for _ in range(min(maximum, len(self._waiting)))]
        return [t[0] for t in taken], [t[1] for t in taken], [t[2] for t in taken], steps
