"""Sizes that follow from the settings, and the checks between fields."""

from __future__ import annotations

import pytest

from shared.config import Geometry, Settings, check_settings, geometry, geometry_notes, num_envs
from shared.errors import SettingError


def test_the_reference_over_56_environments_becomes_whole_ticks_and_chunks() -> None:
    # 1000 / 56 = 17.86 -> 18 ticks; 1e6 // 56 = 17857 rows = 992 chunks of 18; ceil(10000 / 1008) = 10 chunks.
    sizes = geometry(Settings(), 56)
    assert sizes == Geometry(
        num_envs=56, ticks_per_chunk=18, capacity=17856, prefill_chunks=10, num_sequences=200, sequence_length=50
    )
    assert (sizes.frames_per_chunk, sizes.frames_per_step, sizes.prefill_frames) == (1008, 10_000, 10_080)


def test_a_chunk_has_at_least_one_tick() -> None:
    assert geometry(Settings(), 4096).ticks_per_chunk == 1


def test_every_number_that_rounding_changed_is_said_once() -> None:
    assert geometry_notes(Settings(), 56) == [
        "collector.frames_per_batch=1000 becomes 1008: 18 ticks of 56 environments",
        "replay_buffer.buffer_size=1000000 becomes 999936: 17856 rows (992 chunks) for each of 56 environments",
        "collector.init_random_frames=10000 becomes 10080: 10 whole chunks",
    ]


def test_numbers_that_fit_are_not_mentioned() -> None:
    assert geometry_notes(Settings(), 10) == []  # 100 ticks; 100000 rows = 1000 chunks; 10 chunks of 1000


@pytest.mark.parametrize(("workers", "expected"), [(7, 56), (1, 8), (0, 8)])
def test_dm_control_has_workers_times_environments_and_no_worker_counts_as_one(workers: int, expected: int) -> None:
    settings = Settings()
    settings.collector.num_collectors = workers
    assert num_envs(settings) == expected


def test_a_batched_simulator_needs_its_number_of_environments() -> None:
    settings = Settings()
    settings.env.backend = "pendulum"
    with pytest.raises(SettingError, match=r"env\.num_envs=null.*set env\.num_envs=8"):
        num_envs(settings)
    settings.env.num_envs = 3
    assert num_envs(settings) == 3


def test_the_defaults_fit_each_other() -> None:
    check_settings(Settings(), 56)


def test_the_last_training_column_cannot_be_given_to_evaluation() -> None:
    settings = Settings()
    settings.collector.eval_envs = 8
    with pytest.raises(SettingError, match=r"collector\.eval_envs=8 .*below 8"):
        check_settings(settings, 8)
    settings.collector.eval_envs = 7
    check_settings(settings, 8)


@pytest.mark.parametrize(("size", "mend"), [(10_010, 10_000), (49, 50), (76, 100)])
def test_a_batch_is_a_whole_number_of_windows(size: int, mend: int) -> None:
    settings = Settings()
    settings.replay_buffer.batch_size = size
    with pytest.raises(SettingError, match=rf"batch_size={size} .*set replay_buffer\.batch_size={mend}$"):
        check_settings(settings, 56)


def test_the_mend_for_a_ring_that_is_too_short_is_the_smallest_that_passes() -> None:
    settings = Settings()
    settings.collector.frames_per_batch = 50 * 4096
    settings.collector.init_random_frames = 50 * 4096
    settings.replay_buffer.buffer_size = 500_000  # 122 ticks, 100 in whole chunks; 50 + 2 * 50 are needed
    with pytest.raises(SettingError, match=r"holds 100 rows .*raise it to at least 614400 "):
        check_settings(settings, 4096)
    settings.replay_buffer.buffer_size = 614_399
    with pytest.raises(SettingError, match="holds 100 rows"):
        check_settings(settings, 4096)
    settings.replay_buffer.buffer_size = 614_400
    check_settings(settings, 4096)


def test_the_prefill_holds_at_least_one_window_for_every_environment() -> None:
    settings = Settings()
    settings.collector.init_random_frames = 2_000  # 2 chunks of 18 ticks
    with pytest.raises(SettingError, match=r"init_random_frames=2000 fills 36 rows.*raise it to at least 2800"):
        check_settings(settings, 56)
    settings.collector.init_random_frames = 2_800
    check_settings(settings, 56)


def test_the_prefill_fits_the_ring() -> None:
    settings = Settings()
    settings.replay_buffer.buffer_size = 20_000
    settings.collector.init_random_frames = 30_000
    with pytest.raises(SettingError, match=r"init_random_frames=30000 .*more than the 19152 .*lower it or raise"):
        check_settings(settings, 56)
