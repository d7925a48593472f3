"""The learner's end of the collector's socket. It serves one collector at a time, until that collector disconnects.

no collector --connects--> Greeting --Hello / Welcome + slab--> Testing --SelfTest / first Grant--> Streaming
   ^------------------- the collector disconnects or is refused: its grants return to the replay -------'

A text on an arrow names the message that the learner receives and, after the slash, the answer that it sends. If the
slab of the Welcome cannot be used (MappingFailed, or a SelfTest with a wrong checksum), Testing may begin a second time
with another slab (`Handshake.fall_back`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from learner_proc.handshake import Greeting, Handshake, Refused, SharedReplay, Testing
from learner_proc.listener import Listener
from learner_proc.streaming import REPAIR_S, Chunk, Streaming
from shared.errors import HandoverError, TransportError
from shared.handover import Channel, Disconnected, close_descriptors
from shared.logs import LimitedLog
from shared.messages import MAX_REASON_CHARS, Commit, Hello, MappingFailed, Message, NextRound, Refusal, SelfTest
from shared.weights import MAX_VERSION

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

UNMAP_S = 1.0
GREETING_S = 30.0  # a connection that has sent no hello by then is closed
SECOND = "another collector is connected already; expected one at a time; stop the other collector first"
REMINDER_S = 60.0  # between two log lines that no collector streams
MAX_MESSAGES = 32  # that one `poll` takes, so that a collector that sends many cannot stop the gradient steps


class CollectorLink:
    """Serves one collector after the other without ever blocking the gradient step.

    It is one class because any message, and any missing one, can change which of the states serves the collector.
    """

    def __init__(
        self,
        socket_dir: str | Path,
        handshake: Handshake,
        *,
        check_sums: bool,
        log: FilteringBoundLogger,
        newest_version: Callable[[], int] = lambda: MAX_VERSION,
    ) -> None:
        """Open the socket.

        check_sums: compare the checksum of every chunk with its commit. newest_version: returns the newest policy
        version that was published; a commit with a later one is dropped.
        """
        self.listener = Listener(socket_dir, log)
        self._handshake, self._check_sums, self._log = handshake, check_sums, log
        self._newest_version, self._limited = newest_version, LimitedLog(log)
        self._collector: Greeting | Testing | Streaming | None = None
        self._sequence = itertools.count(1)
        self.incarnation = -1  # of the collector that was welcomed last
        self.num_welcomed = 0  # collectors that were sent the slab
        self.num_dropped = 0  # messages that were malformed or not expected
        self.bandwidth = 0.0  # bytes/s of the last self-test
        self._reminder = _Reminder(log)
        self._is_planned = False  # the collector was asked to disconnect

    @property
    def streaming(self) -> Streaming | None:
        """The grants and commits of the present collector; None while no collector streams."""
        return self._collector if isinstance(self._collector, Streaming) else None

    @property
    def shared(self) -> SharedReplay | None:
        """The replay; None until the first collector has sent a valid hello."""
        return self._handshake.shared

    def poll(self) -> list[Chunk]:
        """Return every chunk that was committed since the last call.

        Also accepts connections, answers hellos and self-tests, and notices disconnects. It does not wait, except for
        at most a second if a collector that is refused does not read.
        """
        chunks: list[Chunk] = []
        try:
            for _ in range(MAX_MESSAGES):
                if self._collector is None or (received := self._collector.channel.receive()) is None:
                    break
                close_descriptors(received[1])
                chunk = self._handle(self._collector, received[0])
                if chunk is not None:
                    chunks.append(chunk)
        except Disconnected:
            if chunks:
                return chunks  # the caller counts them first; the next poll reads the end of file again
            self._lose()
        self._count_malformed()
        self._check_time()
        self.listener.check_folder()
        self._accept()
        return chunks

    def flush(self) -> None:
        """Send the grants that are ready, if a collector streams. Never waits."""
        if self.streaming is not None:
            self.streaming.flush()

    def begin_round(self, number: int) -> None:
        """Ask the collector, which has no open grant, to disconnect and to begin again. See `learner_proc.rounds`."""
        if self.streaming is not None:
            self._is_planned = self.streaming.channel.try_send(NextRound(number))

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message from the collector arrives, at most `timeout_s` seconds."""
        if self._collector is not None:
            self._collector.channel.wait(timeout_s)
        else:
            time.sleep(timeout_s)

    def close(self) -> None:
        """Close the connection and the socket that listens.

        A replay on the GPU is freed, because torch prints a warning if shared memory exists when the process ends. The
        collector first has UNMAP_S seconds to unmap it.
        """
        on_gpu = self.shared is not None and self.shared.fd is None
        if self._collector is not None:
            self._collector.channel.close(wait_s=UNMAP_S if on_gpu else 0.0)
        self.listener.close()
        if self.shared is not None and on_gpu:
            self.shared.replay.free()

    def _check_time(self) -> None:
        """Close a connection that does not go on, and log from time to time that no collector streams."""
        reason = overdue(self._collector)
        if self._collector is not None and reason is not None:
            refuse(self._collector.channel, reason, self._limited)
            self._lose()
        self._limited.flush()
        self._reminder.check(streams=self.streaming is not None)

    def _accept(self) -> None:
        """Take a waiting connection, or refuse it while another collector is connected.

        While a connection has not sent its hello, the next one waits: it may be the collector, and this one a stranger.
        """
        if isinstance(self._collector, Greeting):
            return
        channel = self.listener.accept()
        if channel is None:
            return
        if self._collector is None:
            self._collector = Greeting(channel, time.monotonic())
            return
        refuse(channel, SECOND, self._limited)
        channel.close()

    def _count_malformed(self) -> None:
        """Count the malformed messages that have arrived since the last call."""
        if self._collector is None or self._collector.channel.num_malformed == 0:
            return
        number, self._collector.channel.num_malformed = self._collector.channel.num_malformed, 0
        self.num_dropped += number
        self._limited.warning("malformed messages dropped", number=number)

    def _handle(self, collector: Greeting | Testing | Streaming, message: Message) -> Chunk | None:
        """Act on one message; return the chunk if it commits one. A message that is not expected is dropped."""
        try:
            fault = f"it is not expected in the state {type(collector).__name__}"
            if isinstance(collector, Streaming) and isinstance(message, Commit):
                fault = collector.fault_of(message, newest_version=self._newest_version())
                if fault is None:
                    return collector.take(message)
            if isinstance(collector, Greeting) and isinstance(message, Hello):
                self._collector = self._welcome(collector, message)
            elif isinstance(collector, Testing) and isinstance(message, SelfTest):
                self._collector = self._start_streaming(collector, message)
            elif isinstance(collector, Testing) and isinstance(message, MappingFailed):
                self._collector = self._handshake.fall_back(collector.channel, message.reason)
            else:
                self.num_dropped += 1
                self._limited.warning("message dropped", kind=type(message).__name__, reason=fault)
        except Refused as refused:
            refuse(collector.channel, str(refused), self._limited)
            self._lose()
        return None

    def _welcome(self, greeting: Greeting, hello: Hello) -> Testing:
        """Send the slab. Raises: Refused if the hello does not fit this run."""
        testing = self._handshake.welcome(hello, greeting.channel)
        self.incarnation = hello.incarnation
        self.num_welcomed += 1
        transport = "cuda_ipc" if testing.shared.fd is None else "memfd"
        self._log.info("collector welcomed", incarnation=hello.incarnation, pid=hello.pid, transport=transport)
        return testing

    def _start_streaming(self, testing: Testing, result: SelfTest) -> Streaming | Testing:
        """Send the first grant; if the self-test failed, offer other memory. Raises: Refused if there is no other."""
        try:
            self.bandwidth = self._handshake.check_self_test(testing, result)
        except HandoverError as error:
            return self._handshake.fall_back(testing.channel, str(error))
        self._log.info("self-test passed", num_bytes=result.num_bytes, bytes_per_s=round(self.bandwidth))
        streaming = Streaming(testing, self._sequence, check_sums=self._check_sums, log=self._log)
        streaming.flush()
        return streaming

    def _lose(self) -> None:
        """Close the connection and return the open grants to the replay."""
        if self._collector is None:
            return
        self._collector.channel.close()
        self._count_malformed()
        if self.shared is not None:
            self.shared.replay.revoke()
        known = {} if isinstance(self._collector, Greeting) else {"incarnation": self.incarnation}
        if self._is_planned:
            self._log.info("collector begins again", **known)
        else:
            self._limited.warning("collector lost", state=type(self._collector).__name__, **known)
        self._is_planned = False
        self._collector = None


class _Reminder:
    """Logs once a minute that no collector streams."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log, self._since = log, time.monotonic()

    def check(self, *, streams: bool) -> None:
        """Note whether a collector streams now."""
        now = time.monotonic()
        if streams:
            self._since = now
        elif now - self._since > REMINDER_S:
            self._since = now
            self._log.warning("waiting for a collector", seconds=REMINDER_S)


def overdue(collector: Greeting | Testing | Streaming | None) -> str | None:
    """Return why a collector whose next message has not arrived in time must be refused; None if it must not."""
    if collector is None:
        return None
    limit, message, more = GREETING_S, "hello", ""
    if isinstance(collector, Testing):
        limit, message, more = collector.limit_s, "self-test", ", or raise deadlines.start_s"
    if isinstance(collector, Streaming):
        limit, message = REPAIR_S, "valid commit after one that was dropped"
    since = collector.dropped_since if isinstance(collector, Streaming) else collector.since
    if since is None or time.monotonic() - since <= limit:
        return None
    return f"the {message} has not arrived within {limit:g} s; expected it sooner; look at logs/collector.out{more}"


def refuse(channel: Channel, reason: str, log: LimitedLog) -> None:
    """Send the reason to a collector, which then ends."""
    log.error("collector refused", reason=reason)
    try:
        channel.send(Refusal(reason[:MAX_REASON_CHARS]), deadline_s=1.0)
    except TransportError:
        log.warning("the refusal could not be sent")
