"""The command line: its help, its version and its errors."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from launcher.options import parse_options, version_text
from shared.errors import SettingError
from tests.fakes.child import save_checkpoint


def _printed(argument: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_options([argument])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_options_configs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed("--help", capsys)
    for part in ("python launch.py", "quickstart", "isaaclab", "key=value", "--resume", "--version", "130"):
        assert part in text


def test_the_installed_command_is_named_as_the_user_types_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tandem"])
    text = _printed("--help", capsys)
    assert "usage: tandem " in text and "launch.py" not in text


def test_the_version_is_that_of_the_installed_distribution(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _printed("--version", capsys) == f"{version_text()}\n"
    monkeypatch.setattr(metadata, "version", lambda name: {"tandem-dreamer": "1.2.3"}[name])
    assert version_text() == "tandem-dreamer 1.2.3"


def test_without_an_installation_the_version_names_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version_text().startswith("tandem-dreamer is not installed: this is the source tree /")


def test_a_misspelled_option_gets_a_suggestion_only_if_one_is_near() -> None:
    with pytest.raises(SettingError, match=r"--sim-gpus.*expected the options that --help lists; write --sim-gpu$"):
        parse_options(["--sim-gpus", "1"])
    with pytest.raises(SettingError, match=r"--walk.*; give settings as key=value, such as env\.seed=3$"):
        parse_options(["--walk"])


@pytest.mark.parametrize("option", ["--run-dir", "--resume"])
def test_an_empty_path_is_refused(option: str) -> None:
    with pytest.raises(SettingError, match=f"{option}.*the path is empty"):
        parse_options([option, ""])


def test_an_empty_config_is_no_default_config() -> None:
    assert parse_options(["--config", ""]).config == ""
    with pytest.raises(SettingError, match="given together with --config"):
        parse_options(["--resume", "runs/a", "--config", ""])


def test_a_resume_takes_settings_but_no_other_config_or_folder() -> None:
    assert parse_options(["--resume", "runs/a", "env.seed=3"]).overrides == ["env.seed=3"]
    for other in (["--config", "quickstart"], ["--run-dir", "b"]):
        with pytest.raises(SettingError, match=r"--resume runs/a is given together with.*expected --resume alone"):
            parse_options(["--resume", "runs/a", *other])


def test_resume_auto_needs_the_folder_of_the_run() -> None:
    with pytest.raises(SettingError, match=r"--resume auto is given without --run-dir; expected .*; add --run-dir"):
        parse_options(["--resume", "auto", "--config", "quickstart"])
    folder = parse_options(["--resume", "./auto"])
    assert (folder.resume, folder.auto) == (Path("auto"), False)


def test_resume_auto_begins_a_run_until_it_has_a_checkpoint_and_then_continues_it(tmp_path: Path) -> None:
    words = ["--resume", "auto", "--run-dir", str(tmp_path), "--config", "quickstart", "env.seed=3"]
    begun = parse_options(words).decided()
    assert (begun.resume, begun.run_dir, begun.config) == (None, tmp_path, "quickstart")
    save_checkpoint(tmp_path, 20)
    continued = parse_options(words).decided()
    assert (continued.resume, continued.run_dir, continued.config) == (tmp_path, None, None)
    assert continued.overrides == ["env.seed=3"]


def test_a_tilde_in_a_path_is_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert parse_options(["--run-dir=~/x"]).run_dir == Path("/home/user/x")
    assert parse_options(["--resume", "~/x"]).resume == Path("/home/user/x")
