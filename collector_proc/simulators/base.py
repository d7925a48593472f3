"""The interface of every simulator backend: one vector of E environments, and one arrival per tick.

One environment whose episode ends at the second step:

    call       reset()   step(a0)   step(a1)   step(a2)   step(a3)
    is_first      1          0          0          1          0
    is_last       0          0          1          0          0
    action        0          a0         a1         0          a3      as recorded: the reset ignores a2

A simulator may also reset inside `step`. Its arrival then has the true last observation in `obs` and the first
observation of the next episode in `acting_obs`. The arrival after it is `is_first`, and its reward is true and not 0.
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
    """The result of one tick for all E environments, on the simulator's device. It is valid until the next call.

    obs: one entry (E, *shape) for each key of the spec.
    reward: (E,) float32, summed over the action repeat; 0 at a reset.
    is_first, is_last, is_terminal: (E,) bool. A terminal row is the end of the task; a last row may also be a time-out.
    acting_obs: the observations that the policy acts on, if they are not `obs` (see above).
    diverged: (E,) bool, or None for no row. A row whose state was not finite holds zeros, and is first and last at
    once. It does not count as the end of an episode.
    """

    obs: dict[str, Tensor]
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    acting_obs: dict[str, Tensor] | None = None
    diverged: Tensor | None = None


@dataclass(frozen=True)
class ActionRange:
    """The simulator's own values of the actions -1 and 1, one number for each action value."""

    low: tuple[float, ...]
    high: tuple[float, ...]


class Simulator(Protocol):
    """E environments that are stepped together.

    It may also have an attribute `action_range`, an ActionRange. Then exported policies act in the simulator's units.
    """

    spec: StreamSpec
    device: str  # where arrivals are, and where actions must be
    frames_per_step: int  # env frames in one agent step (the action repeat)

    @property
    def num_diverged(self) -> int:
        """The number of rows that were not finite so far, as of the last check. Never waits."""
        ...

    def reset(self) -> Arrival:
        """Begin a new episode in every environment, and return an arrival in which every row is `is_first`."""
        ...

    def step(self, action: Tensor) -> Arrival:
        """Make one agent step in every environment.

        An environment whose previous row was `is_last` ignores the action and is reset: its row is `is_first`, with
        reward 0. This does not apply to simulators that reset inside `step` (see above).
        Shapes: action (E, A) float32 in [-1, 1], on the simulator's device.
        Raises: SimulatorError if a worker died or exceeded its deadline, or if resets do not make the physics finite.
        """
        ...

    def close(self) -> None:
        """Free everything. It must not hang."""
        ...


class SimulatorClass(Protocol):
    """The constructor that the class of every backend has.

    The settings have passed the backend's checks; see `build_simulator`.
    """

    def __call__(self, settings: Settings, *, seed: int, device: str, crash_dir: Path | None) -> Simulator:
        """Build the simulator. Raises: SettingError or SimulatorError if that is not possible."""
        ...
