"""The manifest protects every file and itself, and killed saves are cleaned up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.checkpoints import (
    DamagedError,
    Manifest,
    StoredFile,
    damage,
    damaged_checkpoints,
    mark_damaged,
    newest_checkpoint,
    newest_verified,
    read_manifest,
    settle,
    size_damage,
    write_manifest,
)
from tests.fakes.child import save_checkpoint


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_without_a_folder_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None and damaged_checkpoints(tmp_path / "checkpoints") == []


def test_the_newest_checkpoint_is_the_one_that_was_saved_last(tmp_path: Path) -> None:
    for step in (9, 20):
        save_checkpoint(tmp_path, step)
    root = tmp_path / "checkpoints"
    files = read_manifest(root / "00000009").files
    write_manifest(root / "00000009", Manifest(step=9, serial=100, files=files))  # of a run that was resumed at 5
    (root / "latest").write_text("00000020")
    newest = newest_checkpoint(root)
    assert newest is not None and newest.folder.name == "00000009"


def test_a_folder_without_a_manifest_is_no_whole_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 20)
    root = tmp_path / "checkpoints"
    (root / "00000030").mkdir()
    newest = newest_checkpoint(root)
    assert newest is not None and newest.folder.name == "00000020"
    assert damaged_checkpoints(root) == [(root / "00000030", "manifest.json is missing")]


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    manifest = Manifest(step=7, serial=3, saved_at=1.7e9, eval_return_mean=0.1, files={"a": StoredFile(1, "00000000")})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match="manifest"):
            read_manifest(tmp_path)


def test_a_wrong_byte_is_found_by_the_checksum_alone_and_remembered(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step)
    root = tmp_path / "checkpoints"
    (root / "00000002" / "state.pt").write_text("Networks")
    assert size_damage(root / "00000002") is None
    verified = newest_verified(root)
    assert verified is not None and verified.folder.name == "00000001"
    ((folder, reason),) = damaged_checkpoints(root)
    assert folder.name == "00000002" and "state.pt has checksum" in reason
    newest = newest_checkpoint(root)
    assert newest is not None and newest.folder.name == "00000001", "it is not verified again"


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path, 1)

    def fails(*arguments: object, **options: object) -> str:
        raise OSError("Input/output error")

    monkeypatch.setattr("shared.checkpoints.file_crc32", fails)
    assert damage(folder) == "state.pt cannot be read: Input/output error"


def test_marking_a_folder_that_cannot_be_written_does_nothing(tmp_path: Path) -> None:
    mark_damaged(tmp_path / "missing", "a reason")


def test_what_a_killed_save_left_gets_its_name_if_it_is_whole_and_is_deleted_otherwise(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step)
    root = tmp_path / "checkpoints"
    (root / "00000002").rename(root / ".partial-00000002")
    (root / "00000003").rename(root / ".aside-00000003")  # as an older version left it
    os.truncate(root / ".aside-00000003" / "state.pt", 2)
    outside = tmp_path / "precious"
    outside.mkdir()
    (root / ".partial-link").symlink_to(outside)
    settle(root)
    assert names(root) == [".partial-link", "00000001", "00000002", "latest"] and outside.is_dir()


def test_a_whole_leftover_never_replaces_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2)
    root = tmp_path / "checkpoints"
    (root / "00000002").rename(root / ".aside-00000002")
    save_checkpoint(tmp_path, 2)
    settle(root)
    assert names(root) == ["00000002", "00000002.1", "latest"]
