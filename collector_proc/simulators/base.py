"""The contract every simulator backend keeps: one vector of E environments, one arrival per tick.

    t          reset()   step(a0)   step(a1)   step(a2)   step(a3)
    is_first      1          0          0          1          0
    is_last       0          0          1          0          0
    action        0          a0         a1         0          a3      as recorded: a2 met an ended episode and did nothing

A backend whose simulator resets inside `step` returns the true terminal observation in `obs` and the observation of the
fresh episode in `acting_obs`; its next arrival is `is_first` and keeps the true reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from shared.config import Settings
    from shared.stream import StreamSpec


@dataclass(frozen=True)
class Arrival:
    """What one tick brought, for all E environments, on the simulator's device. Valid until the next call.

    obs: one entry per key of the spec, (E, *shape). reward: (E,) float32, summed over the action repeat, 0 at resets.
    is_first, is_last, is_terminal: (E,) bool. acting_obs: what the policy acts on where it differs from `obs` (simulators
    that reset inside `step`); None means `obs`. diverged: (E,) bool, rows that stand for a state that was not finite: zeros,
    first and last at once, the end of no episode; None means that there are none.
    """

    obs: dict[str, Tensor]
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    acting_obs: dict[str, Tensor] | None = None
    diverged: Tensor | None = None


class Simulator(Protocol):
    """E environments stepped together."""

    spec: StreamSpec
    device: str
    frames_per_step: int  # env frames in one agent step (the action repeat)

    def reset(self) -> Arrival:
        """Start every environment anew; every flag `is_first` is set."""
        ...

    def step(self, action: Tensor) -> Arrival:
        """One agent step of every environment. action: (E, A) float32 in [-1, 1] on the simulator's device.

        Where the previous arrival was `is_last`, the action is ignored and the arrival is the reset: `is_first`, reward 0.
        Raises: SimulatorError if a worker died, hung past the deadline or the physics diverged beyond mending.
        """
        ...

    def close(self) -> None:
        """Free everything; never hangs."""
        ...


class SimulatorClass(Protocol):
    """How the class of a backend is called. The settings have passed the backend's checks; see `build_simulator`."""

    def __call__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None) -> Simulator: ...
