"""The sizes that follow from the settings, and the checks of settings that must fit each other."""

from __future__ import annotations

import pytest

from shared.config import Settings
from shared.errors import SettingError
from shared.geometry import Geometry, check_settings, count_envs, geometry_notes


def _settings(num_envs: int = 56) -> Settings:
    """Return the default settings for a number of environments; the defaults alone choose 7 * 8 = 56."""
    settings = Settings()
    settings.collector.num_collectors, settings.env.n_parallel_envs = 1, num_envs
    return settings


def test_the_defaults_for_56_environments_become_whole_ticks_and_chunks() -> None:
    # 1000 / 56 = 17.86 -> 18 ticks; 1e6 // 56 = 17857 rows = 992 chunks of 18; ceil(10000 / 1008) = 10 chunks.
    geometry = Geometry.of(Settings())
    assert geometry == Geometry(
        num_envs=56,
        num_replayed=56,
        ticks_per_chunk=18,
        capacity=17856,
        prefill_chunks=10,
        num_sequences=200,
        sequence_length=50,
    )
    assert (geometry.frames_per_chunk, geometry.frames_per_step, geometry.prefill_frames) == (1008, 10_000, 10_080)


def test_a_chunk_has_at_least_one_tick() -> None:
    assert Geometry.of(_settings(4096)).ticks_per_chunk == 1


def test_the_number_of_environments_can_be_given_instead_of_taken_from_the_settings() -> None:
    assert Geometry.of(Settings(), 10) == Geometry.of(_settings(10)) != Geometry.of(Settings())


def test_each_rounded_size_is_noted_once() -> None:
    assert geometry_notes(Settings()) == [
        "collector.frames_per_batch=1000 becomes 1008: 18 ticks of 56 environments",
        "replay_buffer.buffer_size=1000000 becomes 999936: 17856 rows (992 chunks) for each of 56 environments",
        "collector.init_random_frames=10000 becomes 10080: 10 whole chunks",
    ]


def test_sizes_that_need_no_rounding_are_not_noted() -> None:
    assert geometry_notes(_settings(10)) == []  # 100 ticks; 100000 rows = 1000 chunks; 10 chunks of 1000


@pytest.mark.parametrize(("workers", "expected"), [(7, 56), (1, 8), (0, 8)])
def test_without_num_envs_each_worker_has_environments_and_no_worker_counts_as_one(workers: int, expected: int) -> None:
    settings = Settings()
    settings.collector.num_collectors = workers
    assert count_envs(settings) == expected


def test_num_envs_is_the_number_of_environments_if_it_is_set() -> None:
    settings = Settings()
    settings.env.num_envs = 3
    assert count_envs(settings) == 3


def test_rows_of_evaluation_environments_can_be_kept_out_of_the_replay() -> None:
    settings = Settings()
    settings.collector.eval_envs = 6
    assert Geometry.of(settings).replayed_per_chunk == Geometry.of(settings).frames_per_chunk == 1008
    settings.collector.eval_in_replay = False
    geometry = Geometry.of(settings)
    assert (geometry.frames_per_chunk, geometry.replayed_per_chunk) == (1008, 900)
    assert (geometry.prefill_frames, geometry.replayed_prefill) == (10_080, 9000)


def test_the_defaults_fit_each_other() -> None:
    check_settings(Settings())


def test_lockstep_needs_a_replay_ratio() -> None:
    settings = Settings()
    settings.collector.mode, settings.optimization.replay_ratio = "lockstep", None
    with pytest.raises(SettingError, match=r"replay_ratio=null.*set optimization\.replay_ratio=64 or collector\.mode"):
        check_settings(settings)
    settings.optimization.replay_ratio = 64.0
    check_settings(settings)


def test_at_least_one_environment_trains() -> None:
    settings = _settings(8)
    settings.collector.eval_envs = 8
    with pytest.raises(SettingError, match=r"collector\.eval_envs=8 .*expected fewer than 8"):
        check_settings(settings)
    settings.collector.eval_envs = 7
    check_settings(settings)


@pytest.mark.parametrize(("size", "nearest"), [(10_010, 10_000), (49, 50), (76, 100)])
def test_a_batch_is_a_whole_number_of_windows(size: int, nearest: int) -> None:
    settings = Settings()
    settings.replay_buffer.batch_size = size
    with pytest.raises(SettingError, match=rf"batch_size={size} .*set replay_buffer\.batch_size={nearest}$"):
        check_settings(settings)


def test_imagination_starts_at_most_once_from_each_step_of_a_batch() -> None:
    settings = Settings()
    settings.optimization.imagination_starts = 10_001
    with pytest.raises(SettingError, match=r"imagination_starts=10001 .*expected at most 10000"):
        check_settings(settings)
    settings.optimization.imagination_starts = 10_000
    check_settings(settings)


def test_the_size_that_is_suggested_for_a_small_replay_is_the_smallest_that_passes() -> None:
    settings = _settings(4096)
    settings.collector.frames_per_batch = 50 * 4096
    settings.collector.init_random_frames = 50 * 4096
    settings.replay_buffer.buffer_size = 500_000  # 122 ticks, 100 in whole chunks; 50 + 2 * 50 are needed
    with pytest.raises(SettingError, match=r"holds 100 rows .*raise it to at least 614400 "):
        check_settings(settings)
    settings.replay_buffer.buffer_size = 614_399
    with pytest.raises(SettingError, match="holds 100 rows"):
        check_settings(settings)
    settings.replay_buffer.buffer_size = 614_400
    check_settings(settings)


def test_the_prefill_holds_at_least_one_window_for_every_environment() -> None:
    settings = Settings()
    settings.collector.init_random_frames = 2_000  # 2 chunks of 18 ticks
    with pytest.raises(SettingError, match=r"init_random_frames=2000 fills 36 rows.*raise it to at least 2800"):
        check_settings(settings)
    settings.collector.init_random_frames = 2_800
    check_settings(settings)


def test_the_prefill_fits_the_replay() -> None:
    settings = Settings()
    settings.replay_buffer.buffer_size = 20_000
    settings.collector.init_random_frames = 30_000
    with pytest.raises(SettingError, match=r"init_random_frames=30000 .*more than the 19152 .*lower it or raise"):
        check_settings(settings)


def test_an_actor_cannot_start_below_its_lowest_std() -> None:
    settings = Settings()
    settings.networks.init_std, settings.networks.actor_min_std = 0.5, 0.6
    with pytest.raises(SettingError, match=r"actor_min_std=0\.6 is above networks\.init_std=0\.5.*expected at most 0"):
        check_settings(settings)
    settings.networks.actor_min_std = 0.5
    check_settings(settings)
