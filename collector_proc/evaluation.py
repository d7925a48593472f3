"""Evaluations: which episodes of the evaluation columns count, and when the next policy version is evaluated.

One evaluation is a number of whole episodes of one policy version. The columns act with a copy of the weights, which
changes only when the evaluation is complete. Example with two columns that play two episodes each, and with version 7
and then version 12:

    weights   | 7                                          | 12
    column 3  |== counts ==|===== counts =====|-- waits ---:-- waits --|== counts ==|= ...
    column 7  |======== counts ========|====== counts =====|======= counts =========|= ...

A column that waits goes on stepping, so that every tick has the same shapes. Its episodes are of the kind "waiting".
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.evaluation import EvaluationPlan


class Evaluations:
    """The state of the present evaluation, on the acting device.

    On a CPU, `is_complete` reads the device at once. On a GPU that would wait, so there it becomes true when the
    numbers of the chunk have arrived (`found`), and the columns wait a little longer.
    """

    def __init__(self, plan: EvaluationPlan, num_envs: int, *, device: torch.device) -> None:
        self.plan = plan
        self.columns = torch.tensor(plan.columns, dtype=torch.int64, device=device)
        self.mask = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.mask[self.columns] = True
        self._quota = torch.zeros(num_envs, dtype=torch.int32, device=device)
        self._quota[list(plan.counted)] = plan.per_column
        self._left = torch.zeros_like(self._quota)  # episodes that a column still has to play
        self._started = torch.zeros_like(self.mask)  # whether the column's episode began with the present weights
        self._versions = [0]  # of every evaluation of this process, by its number; number 0 is none
        self._num_found = 0  # episodes of the present evaluation that have arrived on the host

    @property
    def number(self) -> int:
        """Return the number of the present evaluation, counted from 1; 0 before the first one."""
        return len(self._versions) - 1

    def is_due(self, version: int) -> bool:
        """Return whether the evaluation of this policy version should begin now: it is newer, and the last is over."""
        return bool(self.plan.columns) and version > self._versions[-1] and self.is_complete()

    def is_complete(self) -> bool:
        """Return whether no column has to play an episode, as far as it is known without waiting."""
        if self.number == 0:
            return True
        if not self._left.is_cuda:
            return not self._left.any()
        return self._num_found >= self.plan.num_episodes

    def begin(self, version: int, starting: Tensor | None = None) -> None:
        """Begin the evaluation of a policy version. Episodes in which an action has been chosen do not count.

        starting: (E,) bool, where the next action is the first one of an episode that `count` has been given already.
        """
        self._versions.append(version)
        self._num_found = 0
        self._left.copy_(self._quota)
        self._started.zero_()
        if starting is not None:
            self._started.copy_(starting, non_blocking=True)

    def count(self, first: Tensor, finished: Tensor) -> Tensor:
        """Follow one arrival and return which of the finished episodes count, (E,) bool.

        Shapes: first, finished (E,) bool, on the acting device.
        """
        self._started.logical_or_(first)
        counts = finished & self._started & (self._left > 0)
        self._left.sub_(counts.to(torch.int32))
        return counts

    def version_of(self, number: int) -> int:
        """Return the policy version of an evaluation of this process."""
        return self._versions[number]

    def found(self, numbers: list[int]) -> None:
        """Note the evaluations of the counted episodes of a chunk, after they have arrived on the host."""
        self._num_found += numbers.count(self.number)
