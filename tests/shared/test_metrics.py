"""Every number of a run is declared once, and rows, tags and statuses are made from the declarations."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from shared import metrics
from shared.metrics import (
    FAMILIES,
    KL,
    METRICS,
    OPEN_LOOP,
    REPEAT_LAST,
    SATURATED,
    TRANSPORT,
    UPDATES_PER_S,
    CollectorStatus,
    LearnerStatus,
    Metric,
    find,
    finite_or_none,
    read_status,
    tagged,
    to_row,
)

LEARNER = LearnerStatus(
    gradient_steps=10,
    agent_steps=2000,
    total_optim_steps=100,
    updates_per_s=3.5,
    replay_ratio=64.0,
    replay_ratio_target=None,
    policy_lag_mean=1.5,
    episode_return_mean=None,
    eval_return_mean=12.0,
)


def test_names_and_tags_are_unique_and_every_tag_has_a_group() -> None:
    every = [*METRICS.values(), *(family.member("policy", 5) for family in FAMILIES)]
    assert len({metric.name for metric in every}) == len({metric.tag for metric in every}) == len(every)
    assert all(metric.group and metric.tag == f"{metric.group}/{metric.tag.partition('/')[2]}" for metric in every)
    assert all(name == metric.name for name, metric in METRICS.items())


def test_every_metric_has_a_unit_and_a_sentence() -> None:
    for metric in [*METRICS.values(), *(family.member("policy", 5) for family in FAMILIES)]:
        assert metric.unit and "{" not in metric.unit + metric.meaning, metric.name
        assert metric.meaning[0].isupper() and metric.meaning[-1] == ".", metric.name


def test_every_metric_has_a_constant_of_its_name() -> None:
    for name, metric in METRICS.items():
        assert getattr(metrics, name.upper()) is metric


@pytest.mark.parametrize("entry", ["policy", "joint_pos", "height_scan_2", "_", "camera.rgb"])
@pytest.mark.parametrize("family", [OPEN_LOOP, REPEAT_LAST])
def test_a_member_of_a_family_is_found_by_its_column_name(family: metrics.MetricFamily, entry: str) -> None:
    member = family.member(entry, 15)
    assert member.name.endswith(f"_{entry}_15") and find(member.name) == member


def test_the_metric_of_an_action_dimension_is_found_by_its_column_name() -> None:
    member = SATURATED.member(11)
    assert (member.name, member.tag) == ("saturated_action_11", "behavior/saturated_action_11")
    assert find(member.name) == member and "dimension 11" in member.meaning
    assert find("saturated_action_") is None and find("saturated_action_x") is None


def test_a_declared_metric_is_found_and_an_unknown_column_is_not() -> None:
    assert find("kl") is KL
    for name in ("", "kl_", "open_loop", "open_loop_5", "open_loop__5", "open_loop_policy_", "open_loop_policy_x"):
        assert find(name) is None


def test_a_row_has_column_names_and_null_for_what_json_cannot_express() -> None:
    row = to_row({KL: math.nan, UPDATES_PER_S: math.inf, TRANSPORT: "memfd", OPEN_LOOP.member("policy", 5): 2.0})
    assert row == {"kl": None, "updates_per_s": None, "transport": "memfd", "open_loop_policy_5": 2.0}
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("value", [0, 1.5, -1, True, "nan", None])
def test_values_that_json_can_express_stay_as_they_are(value: object) -> None:
    assert finite_or_none(value) is value


@pytest.mark.parametrize("value", [None, "fast", True, math.nan, -math.inf])
def test_a_metric_has_no_number_in_a_row_without_a_finite_one(value: object) -> None:
    assert KL.of({"kl": value}) is None and KL.of({}) is None
    assert KL.of({"kl": 2}) == 2


def test_tags_are_given_to_the_finite_numbers_of_declared_columns() -> None:
    row = {"kl": 3.0, "loss_obs": None, "transport": "memfd", "foreign": 1.0, "open_loop_joint_pos_5": 2.0}
    assert tagged(row) == {"model/kl": 3.0, "model/open_loop_joint_pos_5": 2.0}


def test_a_status_survives_json() -> None:
    assert read_status(LearnerStatus, json.loads(json.dumps(dataclasses.asdict(LEARNER)))) == LEARNER


def test_a_process_that_has_not_published_a_status_has_none() -> None:
    assert read_status(LearnerStatus, {}) is None
    assert read_status(CollectorStatus, {"agent_steps": 3}) is None


def test_fields_that_a_status_does_not_have_are_ignored() -> None:
    assert read_status(LearnerStatus, dataclasses.asdict(LEARNER) | {"foreign": 1}) == LEARNER


def test_a_declared_status_field_means_the_metric_of_the_same_name() -> None:
    """`total_optim_steps` is the setting of the same name and is no metric."""
    assert {field.name for field in dataclasses.fields(LearnerStatus)} - {"total_optim_steps"} <= set(METRICS)


def test_a_second_metric_of_the_same_name_or_tag_is_refused() -> None:
    for name, tag in (("kl", "model/other"), ("other", "model/kl")):
        with pytest.raises(ValueError, match="declared twice"):
            metrics.declare(name, tag, "nats", "A duplicate.")
    assert isinstance(METRICS["kl"], Metric) and "other" not in METRICS
