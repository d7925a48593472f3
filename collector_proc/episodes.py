"""Returns, lengths and kinds of finished episodes. They are summed on the device and read once per chunk.

On a GPU the numbers are kept in two buffers: while those of one chunk are copied to the host, those of the next chunk
are gathered in the other buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collector_proc.copies import Copier, Copy, DoubleBuffer, copier_between
from collector_proc.evaluation import Evaluations
from collector_proc.simulators.base import Arrival
from shared.messages import EPISODE_KINDS
from shared.stream import StreamSpec

TRAINING, EVALUATION, RANDOM, WAITING = (EPISODE_KINDS.index(kind) for kind in ("train", "eval", "random", "waiting"))
CODES = 8  # an episode's code is 1 + its kind + CODES * the number of its evaluation; exact in float32 up to 2^21


class EpisodeNumbers(NamedTuple):
    """The numbers of one chunk, as they are copied to the host.

    done: (K, 3, E), for each row the return, the length and the code (see CODES) of an episode that finished there; the
    code is 0 elsewhere. steps: (2,), the agent steps in the chunk, of all columns and of the evaluation columns.
    """

    done: Tensor
    steps: Tensor


class FinishedEpisodes(NamedTuple):
    """The episodes that finished in one chunk, and the chunk's agent steps.

    `returns`, `lengths`, `kinds` (indices of EPISODE_KINDS) and `versions` (those evaluated, otherwise 0) describe the
    most recent episodes, oldest first; `num_episodes` counts all of them. `eval_steps` of the `steps` are those of
    evaluation columns.
    """

    returns: list[float]
    lengths: list[int]
    kinds: list[int]
    versions: list[int]
    num_episodes: int
    steps: int
    eval_steps: int


class EpisodeTracker:
    """Follows the return, length and kind of every environment's current episode.

    If the simulator resets inside `step` (its first arrival has `acting_obs`), every row is an agent step, except the
    very first row. Otherwise the rows with `is_first` are not agent steps. An episode whose state diverged is not
    counted.

    copier: the one that also copies the chunk, so that the numbers are complete when the rows are; None creates one.
    """

    def __init__(self, spec: StreamSpec, *, ticks: int, evaluations: Evaluations, copier: Copier | None = None) -> None:
        device = evaluations.mask.device
        self._evaluations = evaluations
        self._resets_inside: bool | None = None  # None before the first arrival
        self._return = torch.zeros(spec.num_envs, device=device)
        self._length = torch.zeros(spec.num_envs, dtype=torch.int32, device=device)
        self._random = torch.ones(spec.num_envs, dtype=torch.bool, device=device)

        def numbers(**where) -> EpisodeNumbers:
            steps = torch.zeros(2, dtype=torch.int64, **where)
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
        finished = last if arrival.diverged is None else last & ~arrival.diverged.to(device)
        done = numbers.done[self._tick]
        done[0].copy_(self._return)
        done[1].copy_(self._length)
        done[2].copy_(torch.where(finished, self._codes(first, finished), 0))
        numbers.steps[0].add_(step.sum())
        numbers.steps[1].add_((step & self._evaluations.mask).sum())
        self._tick += 1

    def _codes(self, first: Tensor, finished: Tensor) -> Tensor:
        """Return the code of every episode that finishes now, (E,)."""
        evaluations = self._evaluations
        counts = evaluations.count(first, finished)
        other = torch.where(evaluations.mask, 1 + WAITING, 1 + TRAINING)
        code = torch.where(counts, 1 + EVALUATION + CODES * evaluations.number, other)
        return torch.where(self._random, 1 + RANDOM, code)

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
            return FinishedEpisodes([], [], [], [], 0, 0, 0)
        self._copy.wait()
        self._copy = None
        done = self._host.done
        ticks, envs = done[:, 2].nonzero(as_tuple=True)
        rows = done[ticks, :, envs]  # (finished, 3), oldest first
        counted = rows[:, 2] % CODES - 1 == EVALUATION
        self._evaluations.found((rows[counted, 2] // CODES).int().tolist())
        returns, lengths, codes = rows[_most_recent(counted, maximum)].T.tolist()
        kinds = [int(code) % CODES - 1 for code in codes]
        versions = [self._evaluations.version_of(int(code) // CODES) for code in codes]
        steps, eval_steps = self._host.steps.tolist()
        return FinishedEpisodes(returns, [int(x) for x in lengths], kinds, versions, len(rows), steps, eval_steps)


def _most_recent(evaluation: Tensor, maximum: int) -> Tensor:
    """Return the indices of at most `maximum` of the most recent episodes, in order.

    Up to half of them are reserved for evaluation episodes. evaluation: (finished,) bool, oldest first.
    """
    first = evaluation.nonzero().flatten()
    first = first[max(0, len(first) - (maximum + 1) // 2) :]
    others = (~evaluation).nonzero().flatten()
    others = others[max(0, len(others) - (maximum - len(first))) :]
    return torch.cat([first, others]).sort().values
