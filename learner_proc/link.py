"""The learner's end of the collector's socket: one incarnation at a time, from hello to obituary.

nobody --connect--> greeting --Hello / Welcome + slab--> testing --SelfTest / first Grant--> streaming
   ^------------------------------- end of file: its grants return to the replay -------------------'
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from learner_proc.replay import Replay
from shared.checksum import checksum
from shared.errors import TransportError
from shared.handover import Channel, Disconnected, export_cuda_slab, listen
from shared.messages import PROTOCOL, Commit, Grant, Hello, Refusal, SelfTest, Welcome
from shared.stream import StreamSpec

GREETING_S = 30.0  # a connection that has not said hello by then is closed


class CollectorLink:
    """Serves one collector at a time without ever blocking the gradient step.

    allocate: called with the first hello's stream spec; makes the replay and returns it with its memfd (None on a GPU).
    random_frames, agent_steps: what the next incarnation is told (rows still to be acted at random; steps so far).
    """

    def __init__(
        self,
        socket_dir: str | Path,
        *,
        run_id: str,
        num_envs: int,
        allocate: Callable[[StreamSpec], tuple[Replay, int | None]],
        random_frames: Callable[[], int],
        agent_steps: Callable[[], int],
        log,
    ) -> None:
        self._listener = listen(socket_dir)
        self._run_id, self._num_envs, self._allocate, self._log = run_id, num_envs, allocate, log
        self._random_frames, self._agent_steps = random_frames, agent_steps
        self._channel: Channel | None = None
        self._state, self._since = "nobody", 0.0
        self._fd: int | None = None
        self._seq = 0
        self._test_row = 0
        self._sent: deque[Grant] = deque()
        self._unsent: deque[tuple[Grant, torch.cuda.Event | None]] = deque()
        self.spec: StreamSpec | None = None
        self.replay: Replay | None = None
        self.incarnation = -1
        self.num_greeted = 0  # incarnations that were sent the slab
        self.num_dropped = 0  # malformed or out of place
        self.bandwidth = 0.0  # bytes/s of the last self-test

    @property
    def streaming(self) -> bool:
        return self._state == "streaming"

    def poll(self) -> list[Commit]:
        """Every commit that has arrived; accepts, greets and tests a newcomer on the way. Never blocks."""
        commits: list[Commit] = []
        if self._channel is not None:
            try:
                while self._channel is not None and (received := self._channel.receive()) is not None:
                    self._take(received[0], commits)
            except Disconnected:
                if commits:
                    return commits  # they count before the obituary, which the next poll will read again
                self._lose()
        if self._state == "greeting" and time.monotonic() - self._since > GREETING_S:
            self._lose()
        self._accept()
        return commits

    def grant(self, version: int = 0) -> None:
        """Take K rows from the replay and send them to the collector once the GPU has passed this point.

        version: the policy that must be adopted first (lockstep), 0 for none.
        """
        assert self.replay is not None and self.streaming
        grant = Grant(self._next_seq(), self.replay.grant(), version)
        event = None
        if self.replay.device.type == "cuda":  # queued steps may still sample these rows
            event = torch.cuda.Event()
            event.record()
        self._unsent.append((grant, event))
        self.flush()

    def flush(self) -> None:
        """Send every grant whose event has passed, as far as the socket has room. Never waits.

        A collector that is gone is noticed by `poll`, after the commits it left in the socket were read.
        """
        try:
            while self._unsent and (self._unsent[0][1] is None or self._unsent[0][1].query()):
                if self._channel is None or not self._channel.try_send(self._unsent[0][0]):
                    return
                self._sent.append(self._unsent.popleft()[0])
        except Disconnected:
            self._log.warning("grant not sent: the collector is gone", incarnation=self.incarnation)

    def wait(self, timeout_s: float) -> None:
        """Sleep until the collector says something, at most `timeout_s` seconds."""
        if self._channel is not None:
            self._channel.wait(timeout_s)
        else:
            time.sleep(timeout_s)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        newcomer = Channel(sock)
        if self._channel is not None:
            self._refuse(
                newcomer, f"collector incarnation {self.incarnation} is connected; wanted one at a time; stop it first"
            )
            return
        self._channel, self._state, self._since = newcomer, "greeting", time.monotonic()

    def _take(self, message: object, commits: list[Commit]) -> None:
        if isinstance(message, Hello) and self._state == "greeting":
            self._welcome(message)
        elif isinstance(message, SelfTest) and self._state == "testing":
            self._check_self_test(message)
        elif isinstance(message, Commit) and self.streaming and self._sent and message.seq == self._sent[0].seq:
            self._sent.popleft()
            commits.append(message)
        else:
            self.num_dropped += 1
            self._log.warning("message dropped", kind=type(message).__name__, state=self._state)

    def _welcome(self, hello: Hello) -> None:
        reason = self._objection(hello)
        if reason is not None:
            assert self._channel is not None
            self._refuse(self._channel, reason)
            self._lose()
            return
        spec = StreamSpec.from_dict(hello.spec)
        if self.replay is None:
            self.spec = spec
            self.replay, self._fd = self._allocate(spec)
        replay = self.replay
        self.incarnation = hello.incarnation
        self._test_row = replay.grant()
        if replay.device.type == "cuda":
            torch.cuda.current_stream(
                replay.device
            ).synchronize()  # the pattern is about to be written; restarts are rare
        uuid, handle = ("", []) if self._fd is not None else export_cuda_slab(replay.slab)
        welcome = Welcome(
            transport="memfd" if self._fd is not None else "cuda_ipc",
            num_bytes=replay.slab.numel(),
            capacity=replay.layout.capacity,
            uuid=uuid,
            handle=handle,
            test_row=self._test_row,
            random_frames=self._random_frames(),
            agent_steps=self._agent_steps(),
        )
        assert self._channel is not None
        self._channel.send(welcome, () if self._fd is None else (self._fd,), deadline_s=1.0)  # the first: there is room
        self._state = "testing"
        self.num_greeted += 1
        self._log.info("collector greeted", incarnation=hello.incarnation, pid=hello.pid, transport=welcome.transport)

    def _objection(self, hello: Hello) -> str | None:
        if hello.protocol != PROTOCOL:
            return f"protocol {hello.protocol}, wanted {PROTOCOL}; both processes must come from one checkout"
        if hello.run_id != self._run_id:
            return f"run {hello.run_id}, wanted {self._run_id}; give both processes the same --run-dir"
        try:
            spec = StreamSpec.from_dict(hello.spec)
        except ValueError as error:
            return str(error)
        if spec.num_envs != self._num_envs:
            return (
                f"{spec.num_envs} environments, wanted {self._num_envs} as the settings say; mend the simulator backend"
            )
        if self.spec is not None and spec != self.spec:
            return (
                f"stream {spec.to_dict()}, wanted {self.spec.to_dict()} as at the first hello; start a new run for it"
            )
        return None

    def _check_self_test(self, test: SelfTest) -> None:
        assert self.replay is not None and self._channel is not None
        chunk, keys = self.replay.chunk(self._test_row), [entry.key for entry in self.replay.layout.fields]
        found = checksum(chunk[key] for key in keys)
        if found != test.checksum:
            reason = (
                f"the transport's self-test failed: checksum {found} in the replay, {test.checksum} in the collector; wanted "
                "equal sums; GPU peer access may be broken (try one GPU for both, or replay_buffer.gpu_storage=false)"
            )
            self._log.error("self-test failed", found=found, sent=test.checksum)
            self._refuse(self._channel, reason)
            self._lose()
            return
        self.bandwidth = test.num_bytes / max(test.write_s, 1e-9)
        self._log.info("self-test passed", num_bytes=test.num_bytes, bytes_per_s=round(self.bandwidth))
        self._state = "streaming"
        self._unsent.append((Grant(self._next_seq(), self._test_row, 0), None))
        self.flush()

    def _refuse(self, channel: Channel, reason: str) -> None:
        self._log.error("collector refused", reason=reason)
        try:
            channel.send(Refusal(reason[:2000]), deadline_s=1.0)
        except TransportError:
            self._log.warning("refusal not delivered")
        if channel is not self._channel:
            channel.close()

    def _lose(self) -> None:
        if self._channel is None:
            return
        self._channel.close()
        self.num_dropped += self._channel.num_malformed
        self._channel = None
        if self.replay is not None:
            self.replay.revoke()
        self._sent.clear()
        self._unsent.clear()
        self._log.warning("collector gone", incarnation=self.incarnation, state=self._state)
        self._state = "nobody"

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq
