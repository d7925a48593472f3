"""The seeds of a collector: they follow from the round in lockstep, and otherwise from what came before."""

from __future__ import annotations

import dataclasses

from collector_proc.rounds import MAX_SEEDS, seed_of
from shared.compose import compose
from shared.config import MAX_SEED
from shared.lifetime import StopFlag
from tests.fakes.fake_process import FakeProgress, fake_process


def seeds(mode: str, *, num_resumes: int = 0, seed: int = 5) -> list[int]:
    """Return the seeds of six collectors: of three rounds, each with two incarnations."""
    settings = compose("quickstart", [f"collector.mode={mode}", f"env.seed={seed}"])
    process = fake_process(settings, FakeProgress(), StopFlag())
    process = dataclasses.replace(process, run=dataclasses.replace(process.run, num_resumes=num_resumes))
    return [seed_of(process, incarnation=i, round_number=n) for n in range(3) for i in range(2)]


def test_in_lockstep_the_seed_follows_from_the_round_alone() -> None:
    first = seeds("lockstep")
    assert first == seeds("lockstep", num_resumes=7) and first[::2] == first[1::2]
    assert len(set(first)) == 3


def test_in_async_mode_no_incarnation_and_no_resume_repeats_the_seed_of_another() -> None:
    first, resumed = seeds("async"), seeds("async", num_resumes=1)
    assert len({*first, *resumed}) == 4


def test_every_seed_fits_in_32_bits() -> None:
    assert all(0 <= seed < MAX_SEEDS for seed in seeds("lockstep", seed=MAX_SEED))
