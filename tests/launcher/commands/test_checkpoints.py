"""`launch.py checkpoints RUN` shows what each checkpoint is and whether it is whole, and changes nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import launch
from shared.checkpoints import Manifest, StoredFile, file_crc32, write_manifest
from tests.fakes.child import save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, of which the newest shares a segment and the oldest has a wrong byte."""
    (tmp_path / "config.yaml").write_text("")
    for step in (10, 20, 30):
        folder = save_checkpoint(tmp_path, step)
        (folder / "replay-000001.bin").write_bytes(b"rows")
        files = {name: StoredFile((folder / name).stat().st_size, file_crc32(folder / name)) for name in FILES}
        saved_at = time.time() - 100 * (40 - step)
        write_manifest(folder, Manifest(step, step, saved_at, 12.5 if step == 20 else None, replay_rows=4, files=files))
    (tmp_path / "checkpoints" / "00000030" / "replay-000001.bin").unlink()
    os.link(*[tmp_path / "checkpoints" / name / "replay-000001.bin" for name in ("00000020", "00000030")])
    (tmp_path / "checkpoints" / "00000010" / "state.pt").write_text("Networks")
    (tmp_path / "checkpoints" / "00000005").mkdir()
    return tmp_path


FILES = ("state.pt", "replay-000001.bin")


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_list_shows_step_age_size_return_and_health_the_newest_first(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run)
    assert launch.main(["checkpoints", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "saved", "size", "replay", "rows", "eval", "return", "health"]
    assert [line.split()[0] for line in lines] == ["30", "20", "10", "00000005"]
    assert lines[0].split()[1:] == ["16", "min", "40", "s", "ago", "0.0", "MB", "4", "-", "whole"]
    assert " 12.5 " in lines[1] and lines[1].endswith("whole")
    assert "damaged: state.pt has checksum" in lines[2] and "unusable: manifest.json is missing" in lines[3]
    assert files_of(run) == before


def test_json_has_the_same_as_plain_values(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["checkpoints", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [30, 20, 10, None]
    assert [row["health"] for row in rows[:2]] == ["whole", "whole"] and rows[0]["num_bytes"] == 12
    assert rows[1]["eval_return_mean"] == 12.5 and rows[0]["age_s"] == pytest.approx(1000, abs=60)


def test_sizes_alone_do_not_find_a_wrong_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["checkpoints", str(run), "--sizes"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_a_shared_segment_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(path: Path, **options: object) -> str:
        read.append(path.name)
        return file_crc32(path)

    monkeypatch.setattr("shared.checkpoints.file_crc32", counted)
    assert launch.main(["checkpoints", str(run)]) == 0
    assert read.count("replay-000001.bin") == 2, "the oldest checkpoint has one of its own"


def test_a_run_without_a_checkpoint_and_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["checkpoints", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")
    assert launch.main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no checkpoint yet\n"
