"""The two values of collector.mode, "async" and "lockstep".

    async       tick tick tick | grant, copy | tick ... commit ... tick       newest weights before every action
    lockstep    grant, weights | tick tick tick | copy, commit | grant, weights | tick ...

They differ in when a chunk gets its grant, when weights are adopted, and when a chunk is committed.
"""

from __future__ import annotations

from typing import Protocol

from collector_proc.acting_policy import ActingPolicy
from collector_proc.learner_input import LearnerInput
from shared.messages import Grant


class Mode(Protocol):
    """The points of the collector's loop at which the two modes differ."""

    waits_for_commit: bool  # whether a chunk is committed before the next tick

    def begin_chunk(self) -> None:
        """Do what has to be done before the first tick of a chunk. Raises: StopRequested if asked to stop."""
        ...

    def take_grant(self) -> Grant:
        """Return the grant for the chunk that is full now. Raises: StopRequested if asked to stop."""
        ...

    def adopt_weights(self) -> None:
        """Adopt weights between two ticks."""
        ...


class AsyncMode:
    """Collects while the learner trains, with the newest weights. It waits for a grant only when a chunk is full."""

    waits_for_commit = False

    def __init__(self, learner: LearnerInput) -> None:
        self._learner = learner

    def begin_chunk(self) -> None:
        """Return at once."""

    def take_grant(self) -> Grant:
        """Wait for the next grant."""
        return self._learner.wait_for_grant()

    def adopt_weights(self) -> None:
        """Adopt the newest weights if any have arrived."""
        self._learner.weights.adopt()


class LockstepMode:
    """Collects in turn with the learner, so that runs are reproducible.

    Before each chunk it waits for a grant, and for the policy version that the grant names. The whole chunk is
    collected with that version.
    """

    waits_for_commit = True

    def __init__(self, learner: LearnerInput, acting: ActingPolicy) -> None:
        self._learner, self._acting = learner, acting
        self._grant: Grant | None = None  # of the chunk that is being gathered

    def begin_chunk(self) -> None:
        """Wait for the chunk's grant, and for the policy version that it names."""
        self._grant = self._learner.wait_for_grant()
        self._learner.wait_for_version(max(self._grant.version, self._acting.required_version))

    def take_grant(self) -> Grant:
        """Return the grant that `begin_chunk` received."""
        grant, self._grant = self._grant, None
        assert grant is not None, "a chunk was gathered without begin_chunk"
        return grant

    def adopt_weights(self) -> None:
        """Return at once: weights change only between chunks."""


def make_mode(name: str, learner: LearnerInput, acting: ActingPolicy) -> Mode:
    """Return the mode with this name, a value of collector.mode."""
    return LockstepMode(learner, acting) if name == "lockstep" else AsyncMode(learner)
