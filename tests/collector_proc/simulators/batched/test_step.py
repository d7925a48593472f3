"""Batched simulators: rows from a step's tensors, observation groups, and actions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from collector_proc.simulators.batched.spaces import ActionMap, ObservationMap
from collector_proc.simulators.batched.step import (
    MAX_STREAK,
    BatchedStep,
    episode_length_s,
    randomize_episode_lengths,
)
from shared.config import EnvSettings
from shared.errors import SettingError, SimulatorError
from shared.stream import ObsSpec, evaluation_columns

CPU = torch.device("cpu")
NO = torch.zeros(3, dtype=torch.bool)


def mask(*environments: int) -> torch.Tensor:
    flags = NO.clone()
    flags[list(environments)] = True
    return flags


def obs(value: float) -> dict[str, torch.Tensor]:
    """policy (3, 2): environment * 100 + value, twice."""
    return {"policy": (torch.arange(3.0) * 100 + value)[:, None].repeat(1, 2)}


def settings(**changes: object) -> EnvSettings:
    return dataclasses.replace(EnvSettings(from_pixels=False), **changes)


def test_a_time_out_is_not_terminal_but_a_time_out_with_termination_is() -> None:
    steps = BatchedStep(3, device=CPU)
    steps.begin(obs(0))
    row = steps.row(obs(1), torch.ones(3), terminated=mask(1, 2), time_out=mask(0, 1))
    assert row.is_last.all() and torch.equal(row.is_terminal, mask(1, 2)) and not row.is_first.any()


def test_the_row_after_a_reset_is_first_and_keeps_its_reward() -> None:
    steps = BatchedStep(3, device=CPU, reward_factor=50.0)
    assert steps.begin(obs(0)).is_first.all()
    row = steps.row(obs(1), torch.full((3,), 0.02), terminated=mask(1), time_out=NO)
    arrival = steps.arrival(row, obs(7), was_reset=mask(1))
    assert arrival.acting_obs is not None
    assert arrival.acting_obs["policy"][:, 0].tolist() == [1, 107, 201] and arrival.obs["policy"][:, 0].tolist() == [
        1,
        101,
        201,
    ]
    row = steps.row(obs(2), torch.full((3,), 0.02), NO, NO)
    assert torch.equal(row.is_first, mask(1)) and row.reward.tolist() == pytest.approx([1.0, 1.0, 1.0])
    steps.arrival(row, row.obs, was_reset=NO)
    assert not steps.row(obs(3), torch.ones(3), NO, NO).is_first.any()


def test_rows_share_no_memory_with_the_simulators_buffers() -> None:
    steps = BatchedStep(3, device=CPU)
    steps.begin(obs(0))
    buffers = obs(1)["policy"], torch.ones(3), mask(0), mask(1)
    fresh = obs(5)
    row = steps.row({"policy": buffers[0]}, *buffers[1:])
    arrival = steps.arrival(row, fresh, was_reset=mask(0, 1))
    for buffer in (*buffers, fresh["policy"]):
        buffer.fill_(9)
    assert arrival.acting_obs is not None
    assert arrival.obs["policy"][:, 0].tolist() == [1, 101, 201] and arrival.reward.tolist() == [1, 1, 1]
    assert arrival.is_last.tolist() == [True, True, False] and arrival.is_terminal.tolist() == [True, False, False]
    assert arrival.acting_obs["policy"][:, 0].tolist() == [5, 105, 201]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_zeros_and_its_environment_is_pending(bad: float, tmp_path: Path) -> None:
    steps = BatchedStep(3, device=CPU, crash_dir=tmp_path)
    steps.begin(obs(0))
    assert steps.pending() is None
    broken, reward = obs(1), torch.tensor([1.0, bad, 3.0])
    broken["policy"][2, 1] = bad
    row = steps.row(broken, reward, terminated=mask(2), time_out=NO)
    arrival = steps.arrival(row, obs(7), was_reset=mask(2))  # the simulator itself has reset environment 2
    assert row.obs["policy"].tolist() == [[1, 1], [0, 0], [0, 0]] and row.reward.tolist() == [1, 0, 0]
    assert torch.equal(row.is_first, mask(1, 2)) and torch.equal(row.is_last, mask(1, 2)) and not row.is_terminal.any()
    assert arrival.acting_obs is not None
    assert arrival.acting_obs["policy"].tolist() == [[1, 1], [0, 0], [207, 207]]
    pending = steps.pending()
    assert pending is not None and pending.tolist() == [1] and steps.num_diverged == 2
    written = np.load(next(tmp_path.glob("diverged-*.npz")))
    assert written["env"].tolist() == [1, 2] and not np.isfinite(written["obs.policy"][1, 1])


def test_a_reset_that_is_not_finite_is_blanked_and_repeated() -> None:
    steps = BatchedStep(3, device=CPU)
    steps.begin(obs(0))
    fresh = obs(7)
    fresh["policy"][0] = float("nan")
    row = steps.row(obs(1), torch.ones(3), terminated=mask(0), time_out=NO)
    arrival = steps.arrival(row, fresh, was_reset=mask(0))
    assert arrival.acting_obs is not None and arrival.acting_obs["policy"][0].tolist() == [0, 0]
    assert arrival.obs["policy"][0].tolist() == [1, 1] and arrival.is_terminal[0], "the row itself was finite"
    pending = steps.pending()
    assert pending is not None and pending.tolist() == [0] and steps.num_diverged == 1


def stream(steps: BatchedStep, num_envs: int, ticks: list[list[int]]) -> None:
    """Make one tick per list; each list names the environments whose reward is NaN."""
    entries, none = {"policy": torch.zeros(num_envs, 1)}, torch.zeros(num_envs, dtype=torch.bool)
    steps.begin(entries)
    for bad in ticks:
        reward = torch.ones(num_envs)
        reward[bad] = float("nan")
        row = steps.row(entries, reward, none, none)
        steps.arrival(row, row.obs, was_reset=none)
        steps.pending()


def test_an_environment_that_keeps_diverging_raises_and_only_a_few_states_are_written(tmp_path: Path) -> None:
    steps = BatchedStep(100, device=CPU, crash_dir=tmp_path)
    with pytest.raises(SimulatorError, match=f"{MAX_STREAK} rows diverged.* and {MAX_STREAK} in one environment"):
        stream(steps, 100, [[7]] * (MAX_STREAK + 1))
    assert steps.num_diverged == MAX_STREAK and len(list(tmp_path.iterdir())) == 4


def test_a_single_finite_row_right_after_a_reset_does_not_end_the_streak() -> None:
    steps = BatchedStep(100, device=CPU)
    with pytest.raises(SimulatorError, match=f"{MAX_STREAK} in one environment without two finite rows"):
        stream(steps, 100, [[7], []] * MAX_STREAK)


def test_rare_divergence_of_environments_that_recover_does_not_raise() -> None:
    steps = BatchedStep(400, device=CPU)  # a different environment in each of 1200 ticks: 0.25 % of the rows
    stream(steps, 400, [[tick % 400] for tick in range(1200)])
    assert steps.num_diverged == 1200


def test_too_many_diverged_rows_raise_although_every_environment_recovers() -> None:
    # Two different environments in each tick are 3.3 % of the rows. The allowed 600 rows are reached after 300 ticks.
    steps = BatchedStep(60, device=CPU)
    with pytest.raises(SimulatorError, match=r"602 rows diverged: 602 of them in the last 1000 ticks.*at most 1%"):
        stream(steps, 60, [[tick % 30, 30 + tick % 30] for tick in range(400)])


def test_only_recent_divergence_counts() -> None:
    steps = BatchedStep(60, device=CPU)
    waves = [[tick % 30, 30 + tick % 30] for tick in range(290)] + [[]] * 1000  # 580 diverged rows, then none
    stream(steps, 60, waves + waves[:290])
    assert steps.num_diverged == 1160


def test_a_state_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = BatchedStep(100, device=CPU, crash_dir=tmp_path / "gone")
    stream(steps, 100, [[7], []])
    assert steps.num_diverged == 1 and "FileNotFoundError" in capsys.readouterr().err


def test_diverged_rows_are_marked_apart_from_ended_episodes() -> None:
    steps = BatchedStep(3, device=CPU)
    steps.begin(obs(0))
    row = steps.row(obs(1), torch.tensor([1.0, float("nan"), 1.0]), terminated=mask(2), time_out=NO)
    assert row.diverged is not None and torch.equal(row.diverged, mask(1)) and torch.equal(row.is_last, mask(1, 2))


def test_an_image_that_leaves_its_range_raises_with_the_values_seen() -> None:
    picture = torch.linspace(0, 1, 3 * 64 * 64).view(3, 64, 64, 1)
    entries = ObservationMap({"camera": picture}, settings(from_pixels=True))
    steps = BatchedStep(3, device=CPU, images=entries)
    steps.begin(entries({"camera": picture}))
    assert steps.pending() is None
    for factor in (1.0, 1.5, 1.0):  # one image outside is enough, also if later ones are inside
        row = steps.row(entries({"camera": factor * picture}), torch.ones(3), NO, NO)
        steps.arrival(row, row.obs, was_reset=NO)
    with pytest.raises(SettingError, match=r"env.image_high=1.0 do not cover .* lie in 0 \.\. 1.5; expected"):
        steps.pending()


def test_rows_can_be_chosen_before_they_are_converted() -> None:
    sample = {"policy": torch.arange(6.0).view(3, 2), "other": torch.zeros(3, 1)}
    entries = ObservationMap(sample, settings())
    assert entries(sample, torch.tensor([2, 0]))["policy"].tolist() == [[4, 5], [0, 1]]


@pytest.mark.gpu
def test_no_ordinary_tick_waits_for_the_gpu() -> None:
    device = torch.device("cuda", 0)
    steps = BatchedStep(3, device=device)
    fresh = {"policy": torch.ones(3, 2, device=device)}
    reward, none = torch.ones(3, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    steps.begin(fresh)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            assert steps.pending() is None  # it waits for an event only, which this mode permits
            row = steps.row(fresh, reward, none, none)
            steps.arrival(row, fresh, was_reset=none)
            assert steps.num_diverged == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("horizon", "step_s"), [(1000, 0.02), (300, 1 / 60), (2, 0.005), (7, 4 * 0.005)])
def test_the_horizon_is_exact_although_the_simulator_rounds_up(horizon: int, step_s: float) -> None:
    import math

    assert math.ceil(episode_length_s(horizon, step_s) / step_s) == horizon


def test_random_ages_stay_below_the_limit_and_evaluation_starts_at_age_0() -> None:
    env = SimpleNamespace(episode_length_buf=torch.zeros(1000, dtype=torch.long), max_episode_length=50)
    whole = evaluation_columns(1000, 10)
    randomize_episode_lengths(env, whole=whole)
    ages, drawn = env.episode_length_buf, torch.ones(1000, dtype=torch.bool)
    drawn[whole] = False
    assert not ages[whole].any() and ages.min() >= 0 and 45 <= ages[drawn].max() < 50
    assert ages[drawn].unique().numel() > 40
    randomize_episode_lengths(SimpleNamespace(), whole=[])  # an environment without such a buffer is left alone


@pytest.mark.parametrize(
    ("groups", "chosen", "names"),
    [
        (("policy", "critic"), None, ["policy"]),
        (("actor", "critic"), None, ["actor"]),
        (("state", "task"), None, ["state", "task"]),
        (("policy", "critic"), ["critic"], ["critic"]),
    ],
)
def test_the_actors_group_is_streamed_unless_env_obs_groups_is_set(groups, chosen, names) -> None:
    sample = {group: torch.zeros(3, 2) for group in groups}
    assert list(ObservationMap(sample, settings(obs_groups=chosen)).spec) == names


def test_vectors_are_flattened_to_float32() -> None:
    sample = {"policy": {"a.b": torch.arange(12).view(3, 2, 2), "flag": torch.ones(3, 1, dtype=torch.bool)}}
    entries = ObservationMap(sample, settings())
    assert entries.spec == {"policy_a_b": ObsSpec((4,), "float32"), "policy_flag": ObsSpec((1,), "float32")}
    assert entries(sample)["policy_a_b"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("first", [True, False])
def test_images_become_64x64_bytes_with_channels_first_or_last(first: bool) -> None:
    # Four 64x64 quarters of one colour each. Halving the size makes every quarter 32x32 pixels of its colour.
    image = torch.zeros(1, 128, 128, 3)
    image[0, :64, :64, 0], image[0, :64, 64:, 1], image[0, 64:, :64, 2], image[0, 64:, 64:] = 1.0, 0.5, 0.25, 1.0
    given = image.permute(0, 3, 1, 2) if first else image
    entries = ObservationMap({"camera": given}, settings(from_pixels=True))
    assert entries.spec == {"pixels": ObsSpec((64, 64, 3), "uint8")}
    pixels = entries({"camera": given})["pixels"][0]
    corners = [pixels[0, 0], pixels[0, 63], pixels[63, 0], pixels[63, 63], pixels[31, 31], pixels[32, 32]]
    assert [corner.tolist() for corner in corners] == [
        [255, 0, 0],
        [0, 128, 0],
        [0, 0, 64],
        [255, 255, 255],
        [255, 0, 0],
        [255, 255, 255],
    ]


def test_grey_images_and_alpha_and_ranges() -> None:
    rgba = torch.tensor([255, 0, 0, 77], dtype=torch.uint8).view(1, 1, 1, 4).repeat(1, 64, 64, 1)
    rgb = ObservationMap({"c": rgba}, settings(from_pixels=True, drop_alpha=True))({"c": rgba})["pixels"]
    assert rgb[0, 5, 5].tolist() == [255, 0, 0]
    grey = ObservationMap({"c": rgba}, settings(from_pixels=True, grayscale=True, drop_alpha=True))({"c": rgba})[
        "pixels"
    ]
    assert grey.shape == (1, 64, 64, 1) and grey[0, 5, 5].tolist() == [76], "0.299 * 255"
    centred = torch.full((1, 64, 64, 1), -1.0)
    centred[0, 0, 0], centred[0, 0, 1] = 0.0, 1.0
    shifted = ObservationMap({"c": centred}, settings(from_pixels=True, image_low=-1.0))({"c": centred})["pixels"]
    assert shifted[0, 0, :3, 0].tolist() == [128, 255, 0]
    with pytest.raises(SettingError, match=r"lie in -1 \.\. 1.*-1 and 1"):
        ObservationMap({"c": centred}, settings(from_pixels=True))


@pytest.mark.parametrize("shape", [(1, 84, 84, 4), (1, 4, 84, 84)])
def test_a_fourth_channel_is_left_out_only_if_the_user_calls_it_transparency(shape: tuple[int, ...]) -> None:
    stacked = {"c": torch.randint(0, 256, shape, dtype=torch.uint8)}
    with pytest.raises(SettingError, match=r"'c' has 4 channels.*4 stacked pictures.*env\.drop_alpha=true"):
        ObservationMap(stacked, settings(from_pixels=True))


def test_several_images_keep_their_names_and_other_shapes_are_refused() -> None:
    blank = torch.zeros(1, 64, 64, 3)
    sample = {"left": blank.byte(), "right": blank.byte(), "state": torch.zeros(1, 2)}
    assert set(ObservationMap(sample, settings(from_pixels=True)).spec) == {"pixels_left", "pixels_right", "state"}
    with pytest.raises(SimulatorError, match=r"\(1, 7, 64, 64\)"):
        ObservationMap({"policy": torch.zeros(1, 7, 64, 64)}, settings(from_pixels=True))
    with pytest.raises(SimulatorError, match=r"image 'left' is 0 in every pixel"):
        ObservationMap({"left": blank}, settings(from_pixels=True))


def test_unbounded_actions_are_scaled_and_bounded_ones_are_mapped_to_their_bounds() -> None:
    inf = float("inf")
    actions = ActionMap([-inf, 0.0, -1.0], [inf, 4.0, 1.0], scale=2.5, device=CPU)
    given = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert actions(given).tolist() == [[-2.5, 0.0, -1.0], [0.0, 2.0, 0.0], [2.5, 4.0, 1.0]] and actions.action_dim == 3


def test_actions_with_one_bound_reach_twice_the_scale_from_it() -> None:
    inf = float("inf")
    actions = ActionMap([0.0, -inf], [inf, 3.0], scale=2.5, device=CPU)
    assert actions(torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])).tolist() == [[0, -2], [2.5, 0.5], [5, 3]]


def test_every_dimension_can_have_a_scale_of_its_own() -> None:
    actions = ActionMap([-math.inf, -1.0], [math.inf, 1.0], scale=[2.5, 1.0], device=CPU)
    assert actions(torch.tensor([[1.0, 1.0]])).tolist() == [[2.5, 1.0]]
    for scale, message in (
        ([2.5], r"has 1 numbers.* 2 dimensions.*=\[1\.0, 1\.0\]"),
        ([2.5, 2.0], r"dimensions \[1\]"),
    ):
        with pytest.raises(SettingError, match=message):
            ActionMap([-math.inf, -1.0], [math.inf, 1.0], scale=scale, device=CPU)


def test_joint_limits_multiply_the_scale_of_dimensions_without_bounds() -> None:
    limits = torch.tensor([4.0, 8.0])
    actions = ActionMap([-math.inf, -1.0], [math.inf, 1.0], scale=0.5, device=CPU, at_limits=limits)
    assert actions(torch.tensor([[1.0, 1.0]])).tolist() == [[2.0, 1.0]]
    with pytest.raises(SettingError, match=r"action_bounds=joint_limits has no effect.*set env.action_bounds=task"):
        ActionMap([-1.0], [1.0], scale=1.0, device=CPU, at_limits=limits[:1])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"a": {"b": torch.zeros(2, 1)}, "a_b": torch.ones(2, 1)},
            r"\['a', 'b'\] and \['a_b'\] would both .*'a_b'; .*env.obs",
        ),
        ({"a.b": torch.zeros(2, 1), "a_b": torch.ones(2, 1)}, r"\['a.b'\] and \['a_b'\] would both .*'a_b'; .*rename"),
        (
            {"pixels": torch.zeros(2, 1), "camera": torch.arange(24576, dtype=torch.uint8).view(2, 64, 64, 3)},
            r"image 'camera' and observation 'pixels' would both .*'pixels'; .*rename",
        ),
    ],
)
def test_two_observations_with_the_same_stream_name_are_refused(sample: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ObservationMap(sample, settings(from_pixels="camera" in sample))
