"""The socket on which the learner waits for collectors, and the watch over the folder in which it lies."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from shared.handover import Channel, listen
from shared.logs import LimitedLog
from shared.socket_folder import REPLAY_SOCKET, FolderWatch, obtain_secret

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# No descriptor or memory is left, or the other process has gone already: the next try may succeed.
NOT_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR)


class Listener:
    """Accepts connections, and opens its socket again if the folder of sockets is damaged in mid-run.

    watch: the watch over the folder. Other sockets in it can be added.
    """

    def __init__(self, socket_dir: str | Path, log: FilteringBoundLogger) -> None:
        self._socket_dir, self._socket = socket_dir, listen(socket_dir)
        self._log, self._limited = log, LimitedLog(log)
        self.watch = FolderWatch(socket_dir, obtain_secret(socket_dir))
        self.watch.add(REPLAY_SOCKET, self._listen_again)

    def accept(self) -> Channel | None:
        """Return the next connection that waits; None if there is none, or if it cannot be accepted now."""
        try:
            sock, _ = self._socket.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in NOT_NOW:
                raise
            self._limited.warning("a connection cannot be accepted now", reason=str(error))
            return None
        return Channel(sock)

    def check_folder(self) -> None:
        """Notice that the folder of sockets was deleted or taken over, and make again what is gone."""
        for name, problem in self.watch.check().items():
            self._limited.warning("the folder of sockets was damaged", name=name, problem=problem)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _listen_again(self) -> None:
        """Open the socket once more, because its file is gone. Connections stay."""
        again = listen(self._socket_dir)
        self._socket.close()
        self._socket = again
