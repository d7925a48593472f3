"""Where the files of a run are: its sockets and its run.json."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from shared import handover, weights
from shared.errors import SettingError
from shared.run_folder import (
    make_socket_dir,
    read_run,
    remove_socket_dir,
)


def test_the_socket_folder_is_private_and_short_even_under_a_long_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    path = make_socket_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in (weights.SOCKET_NAME, handover.SOCKET_NAME):
        assert len(str(path / name)) < 107
    (path / "learner.sock").write_text("")
    remove_socket_dir(path)
    assert not path.exists()


def test_without_a_short_writable_folder_the_error_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 100)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SettingError, match=r"no folder for sockets: TMPDIR=/x+ .*at most 67 bytes; set TMPDIR"):
        make_socket_dir()


def test_a_folder_that_is_no_socket_folder_is_not_removed(tmp_path: Path) -> None:
    remove_socket_dir(tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "a"}'])
def test_a_broken_run_json_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SettingError, match=r"run\.json cannot be read.*launch\.py"):
        read_run(tmp_path)
