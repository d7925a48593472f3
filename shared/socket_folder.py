"""The folder of a run's sockets, the secret in it, and the watch over both.

    /tmp/tandem-k3jx90_q/     mode 0700, made by launch
        replay.sock           the learner listens there (`shared.handover`)
        weights.sock          the learner publishes there (`shared.weights`)
        secret                mode 0600: 32 random bytes that every hello and every message of weights must contain

The folder lies outside the run folder, because Linux limits the path of a Unix socket to 107 bytes. Its mode keeps
other users out. The secret keeps out processes of the same user that belong to another run or to none.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from shared.errors import SettingError, TransportError

SOCKET_PREFIX = "tandem-"
REPLAY_SOCKET, WEIGHTS_SOCKET, SECRET_NAME = "replay.sock", "weights.sock", "secret"
OWN_NAMES = (REPLAY_SOCKET, WEIGHTS_SOCKET, SECRET_NAME)
SECRET_BYTES = 32
# The slash and the socket's name take at most 24 of the 107 bytes.
MAX_SOCKET_DIR_BYTES = 107 - 24
WATCH_S = 1.0  # time between two looks at the folder
Identity: TypeAlias = tuple[int, int, int]  # of a file: device, inode and time of the last change
_RANDOM_BYTES = 8  # of the folder's name, as tempfile.mkdtemp chooses it


def make_socket_dir() -> Path:
    """Return a new folder that only this user may enter (mode 0700), with a new secret. The caller removes it.

    Raises: SettingError if there is no writable folder with a path short enough for sockets.
    """
    # On some clusters TMPDIR is too long for a socket path, so /tmp comes next.
    longest = MAX_SOCKET_DIR_BYTES - len(SOCKET_PREFIX) - _RANDOM_BYTES - 1
    for parent in _temporary_folders():
        if len(os.fsencode(parent)) <= longest and os.access(parent, os.W_OK):
            made = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=parent))
            write_secret(made, secrets.token_bytes(SECRET_BYTES))
            return made
    raise SettingError(
        f"no folder for sockets: TMPDIR={tempfile.gettempdir()} is too long or not writable, and /tmp is not writable; "
        f"expected a writable folder whose path has at most {longest} bytes; set TMPDIR to one"
    )


def write_secret(socket_dir: str | Path, secret: bytes) -> None:
    """Write the secret into a new file that only this user may read. Raises: OSError, for example if it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(Path(socket_dir) / SECRET_NAME, flags, 0o600), "wb") as file:
        file.write(secret)


def read_secret(socket_dir: str | Path) -> bytes:
    """Return the secret of the run. Raises: TransportError if there is none, or if others can read or write it."""
    path = Path(socket_dir) / SECRET_NAME
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            state, secret = os.fstat(file.fileno()), file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise TransportError(
            f"the secret of this run cannot be read: {error}; expected the file that launch wrote; start the run again"
        ) from error
    if state.st_uid != os.geteuid() or state.st_mode & 0o077 or len(secret) != SECRET_BYTES:
        raise TransportError(
            f"{path} belongs to user {state.st_uid}, has mode {stat.S_IMODE(state.st_mode):o} and {len(secret)} bytes; "
            f"expected a file of user {os.geteuid()} with mode 600 and {SECRET_BYTES} bytes; start the run again"
        )
    return secret


def obtain_secret(socket_dir: str | Path) -> bytes:
    """Return the secret of the run; write a new one if the folder has none, as when the learner runs without launch.

    Raises: TransportError, OSError.
    """
    with suppress(FileExistsError):
        write_secret(socket_dir, secrets.token_bytes(SECRET_BYTES))
    return read_secret(socket_dir)


def remove_socket_dir(path: Path, *, is_own: bool = False) -> str | None:
    """Remove a folder of sockets if it is provably one of ours and no process uses it. Return why it was left, or None.

    The path may have been read from a file. So it must be a direct child of the temporary folder, be owned by this user
    with mode 0700, and hold only our sockets, on which no process listens, and our secret.
    is_own: this process made the folder and has ended the processes that used it, so a listener does not matter.
    """
    if not path.name.startswith(SOCKET_PREFIX) or not _is_in_temporary_folder(path):
        return f"it is not named {SOCKET_PREFIX}* in a folder for temporary files"
    try:
        with _opened_folder(path) as folder:
            reason = _why_not_ours(folder, may_listen=is_own)
            if reason is not None:
                return reason
            for name in os.listdir(folder):
                os.unlink(name, dir_fd=folder)
            path.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    return None


def make_room_for_sockets(path: Path) -> None:
    """Remove the sockets of a learner that has ended from its folder, and make the folder if it was deleted."""
    path.mkdir(mode=0o700, exist_ok=True)
    for name in (REPLAY_SOCKET, WEIGHTS_SOCKET):
        with suppress(OSError):
            (path / name).unlink()


def _why_not_ours(folder: int, *, may_listen: bool) -> str | None:
    """Return why the folder with this descriptor is not one of our folders, or is in use; None if it may be removed."""
    if (reason := _why_not_private(folder)) is not None:
        return reason
    for name in os.listdir(folder):
        entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
        expected = stat.S_ISREG if name == SECRET_NAME else stat.S_ISSOCK
        if name not in OWN_NAMES or not expected(entry.st_mode) or entry.st_uid != os.geteuid():
            return f"it holds {name!r}, which is not ours"
        if not may_listen and name != SECRET_NAME and _has_listener(f"/proc/self/fd/{folder}/{name}"):
            return f"a process listens on {name}"
    return None


def _why_not_private(folder: int) -> str | None:
    """Return why other users may enter the folder with this descriptor; None if only this user may."""
    state = os.fstat(folder)
    if state.st_uid == os.geteuid() and stat.S_IMODE(state.st_mode) == 0o700:
        return None
    return f"it belongs to user {state.st_uid} and has mode {stat.S_IMODE(state.st_mode):o}"


def _has_listener(path: str) -> bool:
    """Return whether a process listens on a Unix socket. Any answer but a refusal counts as one."""
    kinds = {REPLAY_SOCKET: socket.SOCK_SEQPACKET, WEIGHTS_SOCKET: socket.SOCK_STREAM}
    with socket.socket(socket.AF_UNIX, kinds[os.path.basename(path)]) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def _is_in_temporary_folder(path: Path) -> bool:
    """Return whether the path is a direct child of a folder in which `make_socket_dir` makes folders."""
    parents = {os.path.realpath(parent) for parent in _temporary_folders()}
    return path.is_absolute() and os.path.realpath(path.parent) in parents


def _temporary_folders() -> tuple[str, str]:
    return (tempfile.gettempdir(), "/tmp")


@contextmanager
def _opened_folder(path: Path) -> Iterator[int]:
    """Open a folder, but not through a symbolic link. Raises: OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield folder
    finally:
        os.close(folder)


class FolderWatch:
    """Notices that the folder of sockets was deleted, or that another process took over one of its sockets.

    Connections that exist do not need the folder, but the next collector does. Cleaners of temporary files delete such
    folders after some days.
    """

    def __init__(self, socket_dir: str | Path, secret: bytes) -> None:
        self._path, self._secret = Path(socket_dir), secret
        self._ours: dict[str, Identity] = {}  # of the sockets that we bound, by name
        self._binders: dict[str, Callable[[], None]] = {}
        self._looked_at = time.monotonic()

    def add(self, name: str, bind_again: Callable[[], None]) -> None:
        """Watch a socket that this process has just bound. `bind_again` binds it once more after its file is gone."""
        self._binders[name], self._ours[name] = bind_again, _identity(self._path / name)

    def check(self) -> Mapping[str, str]:
        """Look at the folder if WATCH_S have passed, and make again what is gone. Return what was wrong, by name.

        The name is that of a socket or of the secret, or "folder". The text is what happened to it.
        """
        if time.monotonic() - self._looked_at < WATCH_S:
            return {}
        self._looked_at = time.monotonic()
        return self.check_now()

    def check_now(self) -> Mapping[str, str]:
        """Do what `check` does, without waiting for the next look."""
        problems: dict[str, str] = {}
        if not self._path.is_dir():
            problems["folder"] = f"{self._path} was deleted, perhaps by a cleaner of temporary files"
        found = {name: _identity_or_none(self._path / name) for name in self._ours}
        lost = [name for name, identity in self._ours.items() if found[name] != identity]
        if not lost and not problems and (self._path / SECRET_NAME).exists():
            return {}
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            with _opened_folder(self._path) as folder:
                if (reason := _why_not_private(folder)) is not None:
                    raise PermissionError(f"{self._path} cannot be used: {reason}")
            self._restore_secret(problems)
            for name in lost:
                deleted = found[name] is None
                problems[name] = "was deleted" if deleted else "was replaced by the socket of another process"
                (self._path / name).unlink(missing_ok=True)
                self._binders[name]()
                self._ours[name] = _identity(self._path / name)
        except OSError as error:
            problems["not restored"] = str(error)
        return problems

    def _restore_secret(self, problems: dict[str, str]) -> None:
        """Write the secret again if its file is gone or holds something else. Raises: OSError."""
        try:
            if read_secret(self._path) == self._secret:
                return
        except TransportError:
            pass
        problems[SECRET_NAME] = "was deleted or changed"
        (self._path / SECRET_NAME).unlink(missing_ok=True)
        write_secret(self._path, self._secret)


def _identity(path: Path) -> Identity:
    """Return what identifies a file; an inode alone may be used again at once. Raises: OSError."""
    state = path.lstat()
    return state.st_dev, state.st_ino, state.st_ctime_ns


def _identity_or_none(path: Path) -> Identity | None:
    with suppress(OSError):
        return _identity(path)
    return None
