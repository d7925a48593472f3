"""A file is replaced as a whole: after any interruption, readers find the old content or the new content."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.files import LineFile, write_atomic, write_json
from tests.processes import DEADLINE_S


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_json_file_holds_the_whole_object(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"run_id": "é", "launches": [{}]})
    assert json.loads((tmp_path / "file").read_text()) == {"run_id": "é", "launches": [{}]}


def test_a_writer_killed_before_the_rename_leaves_the_old_content_and_a_working_next_write(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    script = (
        "import os, pathlib, signal, sys; from shared.files import write_atomic\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(pathlib.Path(sys.argv[1]), 'a longer text that is never seen')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], timeout=DEADLINE_S)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file.partial").exists() and (tmp_path / "file").read_text() == "old"
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    script = (  # the limit on the size of a file fails a write as a full disk does
        "import pathlib, resource, signal, sys; from shared.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_atomic(pathlib.Path(sys.argv[1]), bytes(8192))\n"
    )
    command = [sys.executable, "-B", "-c", script, str(tmp_path / "file")]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert failed.returncode == 1 and "OSError" in failed.stderr
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_that_cannot_be_flushed_does_not_replace_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="input/output error"):
            write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_lines_are_appended_after_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one\n")
    file = LineFile(tmp_path / "file")
    file.append("two \N{LATIN SMALL LETTER E WITH ACUTE}")
    assert (tmp_path / "file").read_text() == "one\ntwo \N{LATIN SMALL LETTER E WITH ACUTE}\n"


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_itself(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "file")
    file.append("whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match=r"space|large"):
                file.append("much too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "file").read_text() == "whole\n"
    file.append("next")
    assert (tmp_path / "file").read_text() == "whole\nnext\n"
