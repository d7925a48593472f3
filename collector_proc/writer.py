"""Granted rows in, finished chunks out: rows are gathered beside the simulator, then copied field by field into the ring.

On a GPU both the rows and the episodes' numbers are gathered in two stages: while the copies of one chunk are under way,
the next one is gathered in the other.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from collector_proc.copies import Copier, Flight, Landed, Stages, copier_between
from collector_proc.simulators.base import Arrival
from shared.checksum import checksum
from shared.messages import EPISODE_KINDS
from shared.stream import Layout, StreamSpec

TRAINING, EVALUATION, RANDOM = (EPISODE_KINDS.index(kind) for kind in ("train", "eval", "random"))


class ChunkWriter:
    """Gathers K rows on the acting device and writes them into the slab with one contiguous copy per field.

    ring: TensorDict [T_cap] of views of the learner's slab (`shared.stream.ring_views`). copier: None for the one that
    fits both ends.
    """

    def __init__(
        self, ring: TensorDict, layout: Layout, *, ticks: int, device: torch.device, copier: Copier | None = None
    ) -> None:
        self._ring, self.ticks = ring, ticks
        self._keys = [entry.key for entry in layout.fields]

        def stage() -> dict[tuple[str, ...], Tensor]:
            return {
                key: torch.zeros((ticks, *layout.shape(entry)[1:]), dtype=getattr(torch, entry.dtype), device=device)
                for key, entry in zip(self._keys, layout.fields, strict=True)
            }

        self._stages = Stages(copier or copier_between(device, ring.device), stage)
        self._flight: Flight = Landed()  # of the chunk written last
        self.num_rows = 0  # gathered so far

    @property
    def full(self) -> bool:
        return self.num_rows == self.ticks

    @property
    def _stage(self) -> dict[tuple[str, ...], Tensor]:
        return self._stages.current

    def add(self, arrival: Arrival, action: Tensor, policy_version: int) -> None:
        """Gather one row. action: the executed action that led to the arrival, 0 at `is_first`."""
        k, stage = self.num_rows, self._stage
        for name, entry in arrival.obs.items():
            stage["obs", name][k].copy_(entry, non_blocking=True)
        row = {"action": action, "reward": arrival.reward, "is_first": arrival.is_first}
        row |= {"is_last": arrival.is_last, "is_terminal": arrival.is_terminal}
        for name, entry in row.items():
            stage[name,][k].copy_(entry, non_blocking=True)
        stage["policy_version",][k].fill_(policy_version)
        self.num_rows += 1

    def write(self, row: int) -> None:
        """Send the gathered chunk to ring rows row..row+K; on a GPU it is there when `arrived` says so, else at once."""
        assert self.full, (self.num_rows, self.ticks)
        stage, rows = self._stage, slice(row, row + self.ticks)
        self._flight = self._stages.send([(self._ring[key][rows], stage[key]) for key in self._keys])
        self.num_rows = 0

    def arrived(self) -> bool:
        """Whether everything written lies in the ring. Never waits."""
        return self._flight.arrived()

    def wait(self) -> None:
        """Let the host wait until everything written lies in the ring."""
        self._flight.wait()

    def checksum(self) -> int:
        """Of the chunk as gathered, to be compared with what the learner finds in its memory."""
        return checksum(self._stage[key] for key in self._keys)

    def write_pattern(self, row: int) -> tuple[int, int, float]:
        """Fill every stage with a pattern and write it like a chunk; returns checksum, bytes and seconds of one write."""
        for entry in (entry for stage in self._stages.all for entry in stage.values()):
            flat = entry.view(-1).view(torch.uint8)
            pattern = torch.arange(flat.numel(), device=flat.device)
            flat.copy_(pattern % 2 if entry.dtype == torch.bool else pattern % 251)
        num_bytes = sum(entry.nbytes for entry in self._stage.values())
        expected, seconds = self.checksum(), []
        for _ in range(3):  # the first write pays for page faults and mappings
            started, self.num_rows = time.perf_counter(), self.ticks
            self.write(row)
            self.wait()
            seconds.append(time.perf_counter() - started)
        return expected, num_bytes, min(seconds)


class EpisodeNumbers(NamedTuple):
    """One chunk's account: done (K, 3, E) return, length and kind + 1 where an episode finished; steps () agent steps."""

    done: Tensor
    steps: Tensor


class Finished(NamedTuple):
    """One chunk's finished episodes and agent steps. Named, in the order in which they ended: returns, lengths and kinds
    (indices of EPISODE_KINDS) of the newest; num_episodes counts all."""

    returns: list[float]
    lengths: list[int]
    kinds: list[int]
    num_episodes: int
    steps: int


class EpisodeTracker:
    """Returns, lengths and kinds of finished episodes, summed on the device and read once per chunk.

    resets_inside: the simulator resets inside `step`, so that every row is an agent step, `is_first` ones too, but for the
    very first, which nobody acted for. An episode whose state diverged is not finished, and counts nowhere.
    copier: the chunk's own, so that its numbers arrive with its rows; None for one that fits the device.
    """

    def __init__(
        self,
        spec: StreamSpec,
        *,
        ticks: int,
        evaluation: Tensor,
        resets_inside: bool,
        copier: Copier | None = None,
    ) -> None:
        device = evaluation.device
        self._evaluation, self._resets_inside = evaluation, resets_inside
        self._began = False
        self._return = torch.zeros(spec.num_envs, device=device)
        self._length = torch.zeros(spec.num_envs, dtype=torch.int32, device=device)
        self._random = torch.ones(spec.num_envs, dtype=torch.bool, device=device)

        def numbers(**where) -> EpisodeNumbers:
            steps = torch.zeros((), dtype=torch.int64, **where)
            return EpisodeNumbers(torch.zeros(ticks, 3, spec.num_envs, **where), steps)

        self._stages = Stages(copier or copier_between(device, None), lambda: numbers(device=device))
        self._host = numbers(pin_memory=device.type == "cuda")
        self._flight: Flight | None = None  # of numbers that nobody has taken yet
        self._tick = 0

    def add(self, arrival: Arrival, *, random: bool) -> None:
        """random: the actions that led to this arrival were drawn without weights."""
        device, numbers = self._return.device, self._stages.current
        first, last = arrival.is_first.to(device), arrival.is_last.to(device)
        step = torch.ones_like(first) if self._resets_inside and self._began else ~first
        self._began = True
        self._return = torch.where(first, 0.0, self._return) + arrival.reward.to(device)
        self._length = torch.where(first, 0, self._length) + step
        self._random = torch.where(first, torch.zeros_like(self._random), self._random) | (step & random)
        kind = 1 + torch.where(self._random, RANDOM, torch.where(self._evaluation, EVALUATION, TRAINING))
        finished = last if arrival.diverged is None else last & ~arrival.diverged.to(device)
        done = numbers.done[self._tick]
        done[0].copy_(self._return)
        done[1].copy_(self._length)
        done[2].copy_(torch.where(finished, kind, 0))
        numbers.steps.add_(step.sum())
        self._tick += 1

    def send(self) -> None:
        """Send the gathered chunk's numbers to the host and go on with the next chunk."""
        assert self._flight is None, "numbers were sent before the last ones were taken"
        self._flight = self._stages.send(list(zip(self._host, self._stages.current, strict=True)))
        self._stages.current.steps.zero_()
        self._stages.current.done.zero_()
        self._tick = 0

    def take(self, maximum: int) -> Finished:
        """What finished in the chunk that was sent, `maximum` episodes by name. Waits for its numbers if they have not
        arrived. Nothing is kept for later: what is not named now would be old by then."""
        if self._flight is None:
            return Finished([], [], [], 0, 0)
        self._flight.wait()
        self._flight = None
        done = self._host.done
        ticks, envs = done[:, 2].nonzero(as_tuple=True)
        rows = done[ticks, :, envs]  # (finished, 3), oldest first
        returns, lengths, kinds = rows[_newest(rows[:, 2] - 1 == EVALUATION, maximum)].T.tolist()
        steps = int(self._host.steps)
        return Finished(returns, [int(x) for x in lengths], [int(x) - 1 for x in kinds], len(rows), steps)


def _newest(evaluation: Tensor, maximum: int) -> Tensor:
    """Indices, in order, of the newest episodes: evaluation's ahead of the others, for up to half of the room."""
    first = evaluation.nonzero().flatten()
    first = first[max(0, len(first) - (maximum + 1) // 2) :]
    others = (~evaluation).nonzero().flatten()
    others = others[max(0, len(others) - (maximum - len(first))) :]
    return torch.cat([first, others]).sort().values
