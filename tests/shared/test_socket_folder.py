"""The folder of sockets: private, with a secret, removed only if it is provably ours, and repaired in mid-run."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import SettingError, TransportError
from shared.handover import listen
from shared.socket_folder import (
    REPLAY_SOCKET,
    SECRET_BYTES,
    SECRET_NAME,
    WEIGHTS_SOCKET,
    FolderWatch,
    make_socket_dir,
    obtain_secret,
    read_secret,
    remove_socket_dir,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_socket_dir()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def bind(path: Path, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    """Bind a socket without listening, as a process that was killed leaves it."""
    bound = socket.socket(socket.AF_UNIX, kind)
    bound.bind(str(path))
    return bound


def test_the_socket_folder_is_private_and_short_even_under_a_long_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    path = make_socket_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in (WEIGHTS_SOCKET, REPLAY_SOCKET):
        assert len(str(path / name)) < 107
    assert remove_socket_dir(path) is None
    assert not path.exists()


def test_without_a_short_writable_folder_the_error_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 100)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SettingError, match=r"no folder for sockets: TMPDIR=/x+ .*at most 67 bytes; set TMPDIR"):
        make_socket_dir()


def test_every_run_has_a_secret_of_its_own_that_only_its_user_can_read(folder: Path) -> None:
    other = make_socket_dir()
    assert len(read_secret(folder)) == SECRET_BYTES and read_secret(folder) != read_secret(other)
    assert stat.S_IMODE((folder / SECRET_NAME).stat().st_mode) == 0o600
    assert obtain_secret(folder) == read_secret(folder), "a secret that is there is kept"
    remove_socket_dir(other)


@pytest.mark.parametrize("spoil", ["mode", "length", "link", "missing", "pipe"])
def test_a_secret_that_others_may_have_written_or_read_is_refused(spoil: str, folder: Path) -> None:
    path = folder / SECRET_NAME
    if spoil == "mode":
        path.chmod(0o640)
    elif spoil == "length":
        path.write_bytes(b"short")
    else:
        path.rename(folder / "other")
        if spoil == "link":
            path.symlink_to(folder / "other")
        if spoil == "pipe":
            os.mkfifo(path, 0o600)
    with pytest.raises(TransportError, match="start the run again"):
        read_secret(folder)


def test_the_folder_of_a_run_that_was_killed_is_removed(folder: Path) -> None:
    bind(folder / REPLAY_SOCKET).close()
    bind(folder / WEIGHTS_SOCKET, socket.SOCK_STREAM).close()
    assert remove_socket_dir(folder) is None
    assert not folder.exists()
    assert remove_socket_dir(folder) is None, "a folder that is gone is no problem"


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
@pytest.mark.parametrize("name", [REPLAY_SOCKET, WEIGHTS_SOCKET])
def test_a_folder_on_whose_socket_a_process_listens_is_left_unless_the_caller_made_it(
    name: str, kind: int, folder: Path
) -> None:
    listener = bind(folder / name, kind)
    listener.listen(1)
    before = sorted(os.listdir(folder))
    assert "listens" in str(remove_socket_dir(folder))
    assert sorted(os.listdir(folder)) == before
    assert remove_socket_dir(folder, is_own=True) is None
    listener.close()


def test_a_folder_is_left_if_anything_else_lies_in_it_or_it_is_not_private(folder: Path) -> None:
    for name in ("results.csv", "replay.sock", "secret"):
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        path = folder / name
        if name == "secret":
            path.mkdir()
        else:
            path.write_text("a file of the user's")
        assert "not ours" in str(remove_socket_dir(folder)) and path.exists()
    shutil.rmtree(folder)
    for mode in (0o755, 0o770, 0o500):
        folder.mkdir()
        folder.chmod(mode)
        assert "mode" in str(remove_socket_dir(folder)) and folder.exists()
        folder.rmdir()


def test_no_folder_outside_the_temporary_folder_and_no_link_is_followed(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "tandem-results"
    precious.mkdir(mode=0o700)
    link = Path(tempfile.gettempdir()) / f"tandem-link-{os.getpid()}"
    link.symlink_to(folder)
    inside = folder / "tandem-inside"
    inside.mkdir(mode=0o700)
    try:
        paths = (
            precious,
            link,
            inside,
            folder / ".." / ".." / "tandem-x",
            Path("tandem-relative"),
            Path("/"),
            Path(""),
        )
        for path in paths:
            assert remove_socket_dir(path) is not None or not path.exists()
        assert precious.exists() and folder.exists() and inside.exists() and link.is_symlink()
    finally:
        link.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_or_a_file_of_another_user_is_left(folder: Path) -> None:
    os.chown(folder / SECRET_NAME, 12345, -1)
    assert "not ours" in str(remove_socket_dir(folder))
    os.chown(folder, 12345, -1)
    assert "belongs to user 12345" in str(remove_socket_dir(folder)) and folder.exists()


class Watched:
    """A learner's socket in a folder, with the watch over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.listener = folder, listen(folder)
        self.watch = FolderWatch(folder, read_secret(folder))
        self.watch.add(REPLAY_SOCKET, self._bind_again)

    def _bind_again(self) -> None:
        self.listener = listen(self.folder)

    def is_ours(self) -> bool:
        """Return whether a connection to the folder's socket reaches this listener."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(self.folder / REPLAY_SOCKET))
            self.listener.setblocking(False)
            try:
                self.listener.accept()[0].close()
            except BlockingIOError:
                return False
            return True


def test_a_folder_that_is_deleted_in_mid_run_is_made_again_with_the_same_secret(folder: Path) -> None:
    watched, secret = Watched(folder), read_secret(folder)
    assert watched.watch.check_now() == {}
    shutil.rmtree(folder)
    problems = watched.watch.check_now()
    assert "was deleted" in problems["folder"] and "was deleted" in problems[REPLAY_SOCKET]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and read_secret(folder) == secret
    assert watched.is_ours() and watched.watch.check_now() == {}


def test_a_socket_that_another_process_binds_is_named_and_taken_back(folder: Path) -> None:
    watched = Watched(folder)
    (folder / REPLAY_SOCKET).unlink()
    thief = bind(folder / REPLAY_SOCKET)
    thief.listen(1)
    assert not watched.is_ours()
    assert "another process" in watched.watch.check_now()[REPLAY_SOCKET]
    assert watched.is_ours() and watched.watch.check_now() == {}


def test_a_secret_that_changes_in_mid_run_is_restored(folder: Path) -> None:
    watched, secret = Watched(folder), read_secret(folder)
    (folder / SECRET_NAME).write_bytes(bytes(SECRET_BYTES))
    assert watched.watch.check_now() == {}, "its content is read only when something is missing"
    (folder / SECRET_NAME).unlink()
    assert SECRET_NAME in watched.watch.check_now()
    assert read_secret(folder) == secret


def test_a_folder_that_another_user_may_enter_is_not_used_again(folder: Path) -> None:
    watched = Watched(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    folder.chmod(0o777)
    assert "mode 777" in watched.watch.check_now()["not restored"]
    assert os.listdir(folder) == []


def test_the_folder_is_looked_at_once_a_second(folder: Path) -> None:
    watched = Watched(folder)
    shutil.rmtree(folder)
    watched.watch._looked_at += 100.0
    assert watched.watch.check() == {}
    watched.watch._looked_at -= 1000.0
    assert watched.watch.check() != {}
