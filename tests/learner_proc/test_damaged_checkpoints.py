"""Three hundred random damages: none is loaded, each is answered by the older whole checkpoint or by an error."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest

from learner_proc import checkpoint
from learner_proc.replay_files import load_replay
from shared.errors import SettingError
from tests.learner_proc.identified_rows import SPEC, make_replay, sampled_rows
from tests.learner_proc.saved_checkpoints import save_two
from tests.learner_proc.test_checkpoint import make_newer

NUM_DAMAGES = 300
OLDER, NEWER = "00000001", "00000002"
KINDS = ("flip", "cut", "zero", "missing", "swap", "swap with the older one", "newer format")


class Template:
    """Two whole checkpoints that can be written again and again. They share one segment, as in a run."""

    def __init__(self, root: Path) -> None:
        save_two(root)
        self._root = root
        self._files = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        self._shared = {path for path in self._files if path.stat().st_nlink > 1}
        assert {path.parent.name for path in self._shared} == {OLDER, NEWER}

    def restore(self) -> None:
        """Write all files again, the shared ones as links."""
        shutil.rmtree(self._root)
        first: dict[str, Path] = {}
        for path, content in self._files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path in self._shared and path.name in first:
                os.link(first[path.name], path)
            else:
                path.write_bytes(content)
                first[path.name] = path


def damage(root: Path, kind: str, chance: random.Random) -> str:
    """Damage the newer checkpoint and return which file was damaged."""
    folder = root / NEWER
    files = sorted(path.name for path in folder.iterdir())
    name = chance.choice(files)
    path = folder / name
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        end = at + chance.choice([1, 16, 512])
        content[at:end] = bytes(len(content[at:end]))
    elif kind == "missing":
        path.unlink()
        return name
    elif kind == "newer format":
        make_newer(folder)
        return "manifest.json"
    else:
        other = folder / chance.choice([each for each in files if each != name])
        if kind == "swap with the older one":
            other = root / OLDER / name
            if not other.exists() or other.samefile(path):
                return damage(root, kind, chance)
        replacement = other.read_bytes()
        other.write_bytes(content)
        content = bytearray(replacement)
    if content == path.read_bytes():  # zeros that were zeros already
        return damage(root, kind, chance)
    with path.open("r+b") as file:  # in place: a damaged disk damages a file under all its names
        file.truncate(len(content))
        file.write(content)
    return name


def rewards(root: Path, chosen: str) -> list[float]:
    found, state = checkpoint.load_newest(root)
    assert found.folder.name == chosen and state == {"step": int(chosen)}
    replay = make_replay()
    load_replay(found, replay, spec_digest=SPEC.digest())
    return replay.views["reward"][sampled_rows(replay)][:, 0].tolist()


def test_no_damaged_checkpoint_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it only takes time here
    monkeypatch.setattr(checkpoint, "structlog", Mock())  # hundreds of warnings
    root, chance = tmp_path / "checkpoints", random.Random(20)
    template, answers = Template(root), Counter()
    assert rewards(root, NEWER) == [float(row) for row in range(24)]
    for number in range(NUM_DAMAGES):
        template.restore()
        kind = KINDS[number % len(KINDS)]
        name = damage(root, kind, chance)
        try:
            assert rewards(root, OLDER) == [float(row) for row in range(12)], (kind, name)
            answers[kind, "the older one"] += 1
        except SettingError as error:
            assert NEWER in str(error) and "expected" in str(error), (kind, name)
            answers[kind, "an error"] += 1
            in_both = name == "replay-000001.bin" and kind != "missing"
            assert in_both or kind.startswith("swap") or kind == "newer format", (kind, name)
    assert sum(answers.values()) == NUM_DAMAGES
    for kind in ("flip", "cut", "zero", "missing"):
        assert answers[kind, "the older one"] > answers[kind, "an error"], kind
    assert answers["newer format", "the older one"] == 0
