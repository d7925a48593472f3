"""Each sign of a run that goes wrong: a row that provokes its warning, and rows of a healthy run that give none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from learner_proc.signs import ROWS, Signs
from learner_proc.totals import Episodes
from learner_proc.warning_lines import WarningLines
from shared import metrics
from shared.config import Settings
from shared.metrics import OPEN_LOOP, SATURATED, Metric
from shared.stream import ObsSpec, StreamSpec

SPEC = StreamSpec(4, {"policy": ObsSpec((3,), "float32"), "pixels": ObsSpec((64, 64, 1), "uint8")}, 1)
ERROR = {"policy": OPEN_LOOP.member("policy", 5), "pixels": OPEN_LOOP.member("pixels", 5)}
HEALTHY: dict[Metric, float | None] = {
    metrics.GRADIENT_STEPS: 50_000,
    metrics.AGENT_STEPS: 100_000,
    metrics.EPISODES: 90,
    metrics.EPISODE_RETURN_MEAN: 400.0,
    metrics.EVAL_RETURN_MEAN: 500.0,
    metrics.KL: 2.0,
    metrics.KL_FREE: 0.1,
    metrics.VALUE_MEAN: 60.0,
    metrics.IMAGINED_VALUE: 50.0,
    metrics.RECORDED_RETURN: 48.0,
    metrics.REWARD_MAX: 1.0,
    metrics.TERMINAL_ROWS: 0,
    metrics.CLIPPED_VALUES: 0,
    metrics.MASKED_ROWS: 0,
    metrics.SATURATED_ACTIONS: 0.2,
    SATURATED.member(0): 0.94,
    ERROR["policy"]: 0.1,
    ERROR["pixels"]: 0.01,
}


def make(tmp_path: Path, **names) -> Signs:
    settings, episodes = Settings(), Episodes()
    settings.optimization.gamma = 0.99
    episodes.load_state({"random": [20.0, 30.0, 40.0, 25.0, 35.0, 30.0]})
    lines = WarningLines(tmp_path / "warnings.jsonl", structlog.get_logger())
    return Signs(settings, SPEC, lines, episodes, lambda: [("policy[3]", 1, 1e25)], **names)


def given(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "warnings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({line["cause"] for line in lines}) == len(lines), "each cause once"
    return {line["cause"]: line["text"] for line in lines}


def check(signs: Signs, rows: int = ROWS, **changes) -> None:
    for _ in range(rows):
        signs.check(HEALTHY | {getattr(metrics, name): value for name, value in changes.items()})


def test_a_healthy_run_gives_no_warning(tmp_path):
    signs = make(tmp_path)
    check(signs, 3, GRADIENT_STEPS=100, EPISODES=0, AGENT_STEPS=4000, KL=None, IMAGINED_VALUE=None, REWARD_MAX=0.0)
    for _ in range(3 * ROWS):
        check(signs, 1)
    assert given(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "cause", "words"),
    [
        ({"CLIPPED_VALUES": 1}, "absurd numbers", ["policy[3] was 1e+25 (1 times)", "max_deviation=100"]),
        ({"MASKED_ROWS": 2}, "numbers that are not finite", ["2 rows", "NaN"]),
        ({"TERMINAL_ROWS": 7}, "terminal rows without a continue head", ["networks.continue_head=true"]),
        ({"EPISODES": 0, "AGENT_STEPS": 20_000}, "no episode ends", ["5000 steps of each", "env.horizon=1000"]),
        ({"VALUE_MEAN": -200.0}, "values beyond all rewards", ["reach 200", "at most 100", "value_lr"]),
        ({"IMAGINED_VALUE": 200.0, "REWARD_MAX": 0.0}, "values beyond all rewards", ["at most 0"]),
        ({"KL": 0.0}, "the KL is 0", ["below 0.01 nats", "optimization.kl_scale"]),
        (
            {"EPISODE_RETURN_MEAN": 29.0, "EVAL_RETURN_MEAN": None},
            "the return stays at random",
            ["50000 gradient steps", "random actions earn 30", "none of the usual causes"],
        ),
    ],
)
def test_each_sign_warns_once_by_name_with_a_likely_fix(tmp_path, changes, cause, words):
    signs = make(tmp_path)
    check(signs, 3 * ROWS, **changes)
    texts = given(tmp_path)
    assert list(texts) == [cause]
    for word in words:
        assert word in texts[cause], texts[cause]


@pytest.mark.parametrize("entry", ["policy", "pixels"])
def test_a_prediction_error_that_grows_for_long_warns_with_the_name_of_its_entry(tmp_path, entry):
    signs = make(tmp_path)
    check(signs, 1)
    for _ in range(ROWS):
        signs.check(HEALTHY | {ERROR[entry]: 3.0})
    (cause,) = given(tmp_path)
    assert cause == f"the prediction error of {entry} explodes"


@pytest.mark.parametrize("changes", [{"VALUE_MEAN": 1e6}, {"KL": 0.0}, {"EVAL_RETURN_MEAN": 0.0}])
def test_a_sign_that_noise_can_show_does_not_warn_before_it_has_lasted(tmp_path, changes):
    signs = make(tmp_path)
    changes = changes | ({"EPISODE_RETURN_MEAN": 0.0} if "EVAL_RETURN_MEAN" in changes else {})
    for _ in range(3):
        check(signs, ROWS - 1, **changes)
        check(signs, 1)
    assert given(tmp_path) == {}


def test_networks_that_have_hardly_trained_show_no_sign(tmp_path):
    check(make(tmp_path), 3 * ROWS, GRADIENT_STEPS=900, KL=0.0, VALUE_MEAN=1e6, EVAL_RETURN_MEAN=0.0)
    assert given(tmp_path) == {}


def test_a_model_that_knows_ends_is_not_warned_of_them(tmp_path):
    signs = make(tmp_path)
    signs.settings.networks.continue_head = True
    check(signs, TERMINAL_ROWS=7)
    assert given(tmp_path) == {}


def test_an_action_dimension_that_is_always_at_a_limit_is_warned_of(tmp_path):
    signs = make(tmp_path)
    for row in range(2 * ROWS):
        signs.check(HEALTHY | {SATURATED.member(0): 0.9 if row == ROWS - 1 else 0.99})
        assert bool(given(tmp_path)) == (row == 2 * ROWS - 1), "it has to last"
    assert "action dimension 0 is at a limit in 99%" in given(tmp_path)["saturated action 0"]


def test_the_likely_causes_of_a_random_return_come_in_their_order(tmp_path):
    signs = make(tmp_path)
    low = {"EPISODE_RETURN_MEAN": 30.0, "EVAL_RETURN_MEAN": 20.0}
    check(signs, ROWS, KL_FREE=1.0, SATURATED_ACTIONS=0.9, RECORDED_RETURN=3.0, **low)
    text = given(tmp_path)["the return stays at random"]
    places = [text.index(word) for word in ("free nats", "90% of the action numbers", "values of 50 are far above")]
    assert places == sorted(places)


def test_further_absurd_numbers_are_warned_of_again_but_seldom(tmp_path, monkeypatch):
    signs = make(tmp_path)
    check(signs, 5, CLIPPED_VALUES=1)
    check(signs, 5, CLIPPED_VALUES=2)
    assert len((tmp_path / "warnings.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr("learner_proc.warning_lines.REPEAT_S", 0.0)
    check(signs, 5, CLIPPED_VALUES=2)
    assert len((tmp_path / "warnings.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_does_not_stop_a_warning_from_reaching_the_log(tmp_path):
    log = structlog.testing.CapturingLogger()
    lines = WarningLines(tmp_path / "absent" / "warnings.jsonl", log)  # type: ignore[arg-type]
    lines.once("a cause", "a text")
    assert [call.args for call in log.calls] == [("a text",)]
