"""Returns, lengths and kinds of finished episodes. They are summed on the device and read once per chunk.

On a GPU the numbers are kept in two buffers: while those of one chunk are copied to the host, those of the next chunk
are gathered in the other buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collector_proc.copies import Copier, Copy, DoubleBuffer, copier_between
from collector_proc.simulators.base import Arrival
from shared.messages import EPISODE_KINDS
from shared.stream import StreamSpec

TRAINING, EVALUATION, RANDOM = (EPISODE_KINDS.index(kind) for kind in ("train", "eval", "random"))


class EpisodeNumbers(NamedTuple):
    """The numbers of one chunk, as they are copied to the host.

    done: (K, 3, E), for each row the return, the length and the kind; the kind is 1 + index in EPISODE_KINDS where an
    episode finished, and 0 elsewhere. steps: scalar, agent steps in the chunk.
    """

    done: Tensor
    steps: Tensor


class FinishedEpisodes(NamedTuple):
    """The episodes that finished in one chunk, and the chunk's agent steps.

    `returns`, `lengths` and `kinds` (indices of EPISODE_KINDS) describe the most recent episodes, oldest first;
    `num_episodes` counts all of them.
    """

    returns: list[float]
    lengths: list[int]
    kinds: list[int]
    num_episodes: int
    steps: int


class EpisodeTracker:
    """Follows the return, length and kind of every environment's current episode.

    If the simulator resets inside `step` (its first arrival has `acting_obs`), every row is an agent step, except the
    very first row. Otherwise the rows with `is_first` are not agent steps. An episode whose state diverged is not
    counted.

    copier: the one that also copies the chunk, so that the numbers are complete when the rows are; None creates one.
    """

    def __init__(self, spec: StreamSpec, *, ticks: int, evaluation: Tensor, copier: Copier | None = None) -> None:
        device = evaluation.device
        self._evaluation = evaluation
        self._resets_inside: bool | None = None  # None before the first arrival
        self._return = torch.zeros(spec.num_envs, device=device)
        self._length = torch.zeros(spec.num_envs, dtype=torch.int32, device=device)
        self._random = torch.ones(spec.num_envs, dtype=torch.bool, device=device)

        def numbers(**where) -> EpisodeNumbers:
            steps = torch.zeros((), dtype=torch.int64, **where)
            return EpisodeNumbers(torch.zeros(ticks, 3, spec.num_envs, **where), steps)

        self._buffers = DoubleBuffer(copier or copier_between(device, None), lambda: numbers(device=device))
        self._host = numbers(pin_memory=device.type == "cuda")
        self._copy: Copy | None = None  # of numbers that `take` has not read yet
        self._tick = 0

    def add(self, arrival: Arrival, *, random: bool) -> None:
        """Count one arrival. random: the actions that led to it were drawn without weights."""
        device, numbers = self._return.device, self._buffers.current
        first, last = arrival.is_first.to(device), arrival.is_last.to(device)
        step = torch.ones_like(first) if self._resets_inside else ~first
        if self._resets_inside is None:
            self._resets_inside = arrival.acting_obs is not None
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
        """Start to copy the gathered chunk's numbers to the host, and begin to gather the next chunk's."""
        assert self._copy is None, "the numbers of the previous chunk were not taken"
        self._copy = self._buffers.send(list(zip(self._host, self._buffers.current, strict=True)))
        self._buffers.current.steps.zero_()
        self._buffers.current.done.zero_()
        self._tick = 0

    def take(self, maximum: int) -> FinishedEpisodes:
        """Return the episodes that finished in the chunk sent last, at most `maximum` of them in detail.

        The call blocks until the copy of their numbers is done. The remaining episodes are only counted, and they are
        not kept for a later call. Without a new chunk the result is empty.
        """
        if self._copy is None:
            return FinishedEpisodes([], [], [], 0, 0)
        self._copy.wait()
        self._copy = None
        done = self._host.done
        ticks, envs = done[:, 2].nonzero(as_tuple=True)
        rows = done[ticks, :, envs]  # (finished, 3), oldest first
        returns, lengths, kinds = rows[_most_recent(rows[:, 2] - 1 == EVALUATION, maximum)].T.tolist()
        steps = int(self._host.steps)
        return FinishedEpisodes(returns, [int(x) for x in lengths], [int(x) - 1 for x in kinds], len(rows), steps)


def _most_recent(evaluation: Tensor, maximum: int) -> Tensor:
    """Return the indices of at most `maximum` of the most recent episodes, in order.

    Up to half of them are reserved for evaluation episodes. evaluation: (finished,) bool, oldest first.
    """
    first = evaluation.nonzero().flatten()
    first = first[max(0, len(first) - (maximum + 1) // 2) :]
    others = (~evaluation).nonzero().flatten()
    others = others[max(0, len(others) - (maximum - len(first))) :]
    return torch.cat([first, others]).sort().values
