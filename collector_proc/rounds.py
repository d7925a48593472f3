"""Rounds of lockstep, on the collector's side: when to begin again, and with which seeds. Torch-free.

`learner_proc/rounds.py` explains what a round is.
"""

from __future__ import annotations

from shared.process import Process

MAX_SEEDS = 1 << 32  # seeds of simulators have 32 bits


class RoundBegins(Exception):
    """The learner begins another round: build the simulator again, with the seed of that round, and connect again."""

    def __init__(self, number: int) -> None:
        super().__init__(f"round {number} begins")
        self.number = number


def seed_of(process: Process, *, incarnation: int, round_number: int) -> int:
    """Return the seed of a collector's simulator.

    In lockstep it depends on the round alone, so that a round is the same however often its processes were started.
    Otherwise it depends on what came before, so that no collector repeats the episodes of another one.
    """
    seed = process.settings.env.seed
    if process.settings.collector.mode == "lockstep":
        return (seed + 1_000_000 * round_number) % MAX_SEEDS
    return (seed + 1000 * incarnation + 1_000_000 * process.run.num_resumes) % MAX_SEEDS
