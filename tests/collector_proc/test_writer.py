"""Chunks are written to the ring rows that were granted, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from collector_proc.copies import Copier
from collector_proc.simulators.base import Arrival
from collector_proc.writer import ChunkWriter
from shared.checksum import checksum
from shared.stream import ObsSpec, StreamSpec, plan_layout, ring_views
from tests.fakes.late_copier import LateCopier

E, K = 3, 4
SPEC = StreamSpec(E, {"policy": ObsSpec((2,), "float32"), "pixels": ObsSpec((4, 4, 1), "uint8")}, 1)
CPU = torch.device("cpu")
UNWRITTEN = 0xAB  # every byte of the ring before the test


def arrival(tick: int, *, first: tuple[int, ...] = ()) -> Arrival:
    """Return an arrival with observation 1000 * environment + tick; `first` lists the environments with `is_first`."""
    value = 1000.0 * torch.arange(E) + tick
    is_first, none = torch.tensor([env in first for env in range(E)]), torch.zeros(E, dtype=torch.bool)
    obs = {"policy": value[:, None].expand(E, 2), "pixels": torch.full((E, 4, 4, 1), tick, dtype=torch.uint8)}
    return Arrival(obs, torch.where(is_first, 0.0, torch.ones(E)), is_first, none, none)


def make_writer(capacity: int = 12, copier: Copier | None = None):
    layout = plan_layout(SPEC, capacity)
    slab = torch.full((layout.num_bytes,), UNWRITTEN, dtype=torch.uint8)
    ring = ring_views(slab, layout)
    return ChunkWriter(ring, layout, ticks=K, device=CPU, copier=copier), ring, layout


def test_a_chunk_is_written_to_its_granted_rows_and_nowhere_else():
    writer, ring, layout = make_writer()
    for tick in range(K):
        writer.add(arrival(tick, first=(0,) if tick == 0 else ()), torch.full((E, 1), 0.25), policy_version=7 + tick)
    assert writer.full
    writer.write(4)
    assert ring["obs", "policy"][4:8, :, 0].tolist() == [[1000.0 * env + tick for env in range(E)] for tick in range(K)]
    assert ring["policy_version"][4:8].tolist() == [7, 8, 9, 10]
    assert ring["is_first"][4:8, 0].tolist() == [True, False, False, False]
    assert ring["reward"][4].tolist() == [0.0, 1.0, 1.0] and (ring["action"][4:8] == 0.25).all()
    assert ring["obs", "pixels"][7].unique().tolist() == [3]
    for entry in layout.fields:
        rows = ring[entry.key]
        for outside in (rows[:4], rows[8:]):
            assert (outside.contiguous().view(-1).view(torch.uint8) == UNWRITTEN).all(), entry.name
    assert not writer.full


def test_the_writers_checksum_equals_that_of_the_ring_and_differs_after_one_changed_byte():
    writer, ring, layout = make_writer()
    for tick in range(K):
        writer.add(arrival(tick), torch.zeros(E, 1), policy_version=1)
    expected = writer.checksum()
    writer.write(8)
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][8:12] for key in keys) == expected
    ring["obs", "pixels"][9, 1, 2, 2, 0] += 1
    assert checksum(ring[key][8:12] for key in keys) != expected


def test_the_checksum_changes_when_two_rows_are_swapped():
    rows = torch.arange(12.0).view(4, 3)
    assert checksum([rows]) != checksum([rows[[1, 0, 2, 3]]])


def test_the_self_test_pattern_is_complete_in_the_ring():
    writer, ring, layout = make_writer()
    expected, num_bytes, seconds = writer.write_pattern(0)
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][:K] for key in keys) == expected
    assert num_bytes == sum(ring[key][:K].nbytes for key in keys) and seconds > 0
    assert not writer.full


def test_rows_that_are_gathered_during_a_copy_do_not_change_the_chunk_being_copied():
    copier = LateCopier()
    writer, ring, _ = make_writer(copier=copier)
    for tick in range(3 * K):
        writer.add(arrival(tick), torch.zeros(E, 1), policy_version=tick)
        if writer.full:
            assert writer.done() == (tick < K)
            writer.write(tick + 1 - K)
            assert copier.num_blocked_streams == tick // K, (
                "new rows wait only for the last copy out of their own buffer"
            )
    assert not writer.done() and copier.num_pending == 1
    assert ring["policy_version"][:].tolist()[: 2 * K] == list(range(2 * K))
    writer.wait()
    assert writer.done() and ring["policy_version"][:].tolist() == list(range(3 * K))


def test_the_self_test_fills_every_buffer_with_the_pattern():
    writer, ring, layout = make_writer(copier=LateCopier())
    expected, _, _ = writer.write_pattern(0)  # the third and last write comes from the first of the two buffers
    keys = [entry.key for entry in layout.fields]
    assert checksum(ring[key][:K] for key in keys) == expected
    writer.num_rows = K
    writer.write(4)  # from the second buffer
    writer.wait()
    assert checksum(ring[key][4:8] for key in keys) == expected


def test_writing_a_chunk_that_is_not_full_is_an_error():
    writer, _, _ = make_writer()
    writer.add(arrival(0), torch.zeros(E, 1), policy_version=0)
    with pytest.raises(AssertionError):
        writer.write(0)
