"""Where the files of a run are: its newest complete checkpoint and its run.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import SettingError
from shared.run_folder import (
    checkpoint_step,
    newest_checkpoint,
    read_run,
)
from tests.fakes.child import save_checkpoint


def test_the_newest_checkpoint_is_the_one_that_latest_names_if_it_is_complete(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert newest_checkpoint(checkpoints) is None
    for step in (9, 20):
        save_checkpoint(tmp_path, step)
    (checkpoints / "latest").write_text("00000009")
    assert newest_checkpoint(checkpoints) == checkpoints / "00000009"
    assert checkpoint_step(checkpoints / "00000009") == 9


@pytest.mark.parametrize("latest", ["00000030", "00000040", "", None])
def test_if_latest_names_no_complete_checkpoint_the_one_with_the_highest_step_is_taken(
    latest: str | None, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (9, 20):
        save_checkpoint(tmp_path, step)
    (checkpoints / "00000030").mkdir()  # no manifest.json: incomplete
    (checkpoints / "latest").unlink()
    if latest is not None:
        (checkpoints / "latest").write_text(latest)
    assert newest_checkpoint(checkpoints) == checkpoints / "00000020"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "a"}'])
def test_a_broken_run_json_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SettingError, match=r"run\.json cannot be read.*launch\.py"):
        read_run(tmp_path)
