"""The command `settings`: it lists every setting once, and the values of a config."""

from __future__ import annotations

import json

import pytest

import launch
from shared.compose import compose, setting_keys


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert launch.main(["settings", *arguments]) == 0
    return capsys.readouterr().out


def test_every_setting_is_listed_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys).splitlines()
    assert [line.partition("=")[0] for line in lines if line and line[0] != " "] == [key for key, _ in setting_keys()]
    assert max(map(len, lines)) <= 80


def test_the_json_has_every_fact_of_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(_printed(capsys, "env.frame_skip", "--json"))
    assert row.pop("doc").startswith("Simulator steps per agent step")
    assert row == {
        "key": "env.frame_skip",
        "value": 2,
        "default": 2,
        "type": "int",
        "unit": "env frames",
        "minimum": 1,
        "maximum": 10_000,
        "choices": None,
    }


def test_a_group_of_a_config_shows_its_values_beside_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    compile = compose("quickstart").optimization.compile
    assert not compile.enabled and compile.cudagraphs
    text = _printed(capsys, "optimization.compile", "--config", "quickstart")
    assert "optimization.compile.enabled=false (default: true)\n    [bool]\n    Compile the networks" in text
    assert "optimization.compile.cudagraphs=true\n" in text
    assert "[str, one of inductor, aot_eager, eager]" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env.sed"], "there is no setting env.sed; expected a setting, or a group: checkpoint, collector,"),
        (["env.sed"], "; write env.seed\n"),
        (["optimisation"], "; write optimization\n"),
        (["qqqq"], "; leave it out to list all settings\n"),
        (["replay_buffer.prefetch"], "there is no setting replay_buffer.prefetch, "),
        (["--config", "quickstrat"], "use --config quickstart"),
        (["env", "collector"], "unrecognized arguments: collector"),
    ],
)
def test_a_key_or_config_that_does_not_exist_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["settings", *arguments]) == 2
    assert message in capsys.readouterr().err
