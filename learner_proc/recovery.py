"""What happens when gradients stop being finite: the learner goes back to an earlier state, or ends by name.

A step whose gradient is not finite changes nothing, because the device skips it. If no step of the last
`optimization.max_skipped` had a finite gradient, the parameters themselves lead to overflow, and waiting will not help.
Then parameters and moments become those of an earlier step, and training goes on. The random generators are
not set back, so that other windows and other noise are drawn. Steps keep counting on.

The earlier states are two copies in the memory of the device, taken COPY_STEPS steps apart. A checkpoint would do as
well, but it can be half an hour old, and reading it takes minutes and a disk that works. A copy takes less than a
millisecond on a GPU, and three times the parameters' memory. A roll-back takes the older copy: the newer one may have
been taken at the edge of the cliff. For example, with COPY_STEPS = 1000:

    step       0 ........ 1000 ....... 2000 ....... 2600 ... 2700
    copies     0          0, 1000      1000, 2000   NaN ---> the state of 1000 again; it is the only copy now
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner_proc.gradient_step import NORMALISER, GradientStep
from learner_proc.warning_lines import WarningLines

if TYPE_CHECKING:
    from learner_proc.device_sums import DeviceSums
    from shared.config import OptimizationSettings

COPY_STEPS = 1000
MARK_STEPS = 10  # steps between two looks at the number of skipped steps
FORGET_STEPS = 10_000  # after so many steps without a roll-back, earlier ones no longer count towards the budget


class Recovery:
    """Keeps copies of the learner's state, and restores one when gradients are no longer finite. Never waits."""

    def __init__(
        self,
        step: GradientStep,
        options: OptimizationSettings,
        sums: DeviceSums,
        warnings: WarningLines,
        *,
        first_step: int = 0,
    ) -> None:
        """first_step: the number of gradient steps so far. The first copy is taken now."""
        self._options, self._sums, self._warnings = options, sums, warnings
        groups = step.tensors()
        # Statistics of observations are no part of what diverges, and rows that came since the copy must stay in them.
        self._statistics = list(groups.pop(NORMALISER, {}).values())
        self._trained: list[Tensor] = [tensor for group in groups.values() for tensor in group.values()]
        self._live = [*self._statistics, *self._trained]
        self._copies: deque[tuple[int, list[Tensor]]] = deque()  # the step of each copy and its tensors, oldest first
        self._spare = [[tensor.clone() for tensor in self._live] for _ in range(2)]
        self._mark_steps = min(MARK_STEPS, options.max_skipped, options.publish_every)
        self._rolled_back: deque[int] = deque()  # steps of the roll-backs that count
        self.num_rollbacks = 0  # of this process
        self._copy(first_step)

    def check(self, step: int, *, not_finite: bool = False) -> None:
        """Look at the newest steps. Call it after each gradient step, with their number.

        not_finite: the state itself is known to hold a number that is not finite.
        Raises: FloatingPointError if it is time to roll back and the budget is spent.
        """
        if step % self._mark_steps == 0:
            self._sums.mark()
        skipped = self._sums.poll_marks()
        if skipped >= self._options.max_skipped or not_finite:
            self._roll_back(step, skipped)
        elif skipped == 0 and step - self._copies[-1][0] >= COPY_STEPS:
            self._copy(step)

    @torch.no_grad()
    def _copy(self, step: int) -> None:
        """Keep a copy of the present state, in place of the older one of two."""
        if len(self._copies) == 2:
            self._spare.append(self._copies.popleft()[1])
        self._copies.append((step, self._spare.pop()))
        torch._foreach_copy_(self._copies[-1][1], self._live)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _roll_back(self, step: int, skipped: int) -> None:
        while self._rolled_back and step - self._rolled_back[0] > FORGET_STEPS:
            self._rolled_back.popleft()
        what = f"the gradients of the last {skipped} steps up to step {step} were not finite"
        if not skipped:
            what = f"the weights of step {step} were not finite"
        if len(self._rolled_back) >= self._options.max_rollbacks:
            raise FloatingPointError(
                f"{what}, and {len(self._rolled_back)} roll-backs to earlier states did not help "
                f"(optimization.max_rollbacks={self._options.max_rollbacks}); expected finite losses; resume from a "
                "checkpoint with lower learning rates or optimization.autocast=bfloat16"
            )
        kept, copies = self._copies.popleft()
        num_statistics = len(self._statistics)
        torch._foreach_copy_(self._trained, copies[num_statistics:])  # pyright: ignore[reportPrivateImportUsage]
        for live, copy in zip(self._statistics, copies[:num_statistics], strict=True):
            live.copy_(torch.where(live.isfinite(), live, copy))
        self._spare.extend(tensors for _, tensors in self._copies)
        self._copies = deque([(kept, copies)])
        self._sums.forget_marks()
        self._rolled_back.append(step)
        self.num_rollbacks += 1
        self._warnings.again(
            "gradients are not finite",
            f"{what}: the learner went back to its state of step {kept} and goes on with other random numbers; "
            "expected finite losses; if it happens again, lower the learning rates, or set "
            "optimization.autocast=bfloat16",
        )
