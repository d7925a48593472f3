"""What happens between a collector's connection and its first grant: hello, welcome, self-test."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from learner_proc.replay import Replay
from shared.checksum import checksum
from shared.errors import HandoverError, SettingError
from shared.handover import Channel, export_cuda_slab
from shared.messages import PROTOCOL, Hello, SelfTest, Welcome
from shared.model.encoder import check_entry
from shared.stream import StreamSpec

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

SELF_TEST_S = 900.0  # before the self-test, the collector builds its policy and captures a CUDA graph


class Refused(Exception):
    """The learner cannot work with this collector. The text is sent to it."""


@dataclass(frozen=True)
class SharedReplay:
    """The replay, and what a collector needs to write into it.

    fd: the descriptor of the memory file (memfd) that holds the slab; None if the slab lies on a GPU.
    """

    spec: StreamSpec
    replay: Replay
    fd: int | None


@dataclass(frozen=True)
class Greeting:
    """A collector has connected at the time `since` (time.monotonic() seconds). Its hello has not arrived yet."""

    channel: Channel
    since: float


@dataclass(frozen=True)
class Testing:
    """A collector was sent the slab, at the time `since` (time.monotonic() seconds). It has not sent its self-test yet.

    For the self-test it writes a pattern into the chunk that starts at ring row `test_row`, and reports the checksum.
    It is refused after `limit_s` seconds.
    """

    channel: Channel
    shared: SharedReplay
    test_row: int
    limit_s: float = SELF_TEST_S
    since: float = field(default_factory=time.monotonic)


class Handshake:
    """Check hellos, hand the replay over, and check self-tests.

    The first valid hello decides what the run streams: the replay is allocated for it. Every later collector must
    stream the same. The first self-test that passes decides where the replay lies: from then on chunks, networks and
    CUDA graphs refer to its memory. Before that, a replay on the GPU that a collector cannot use is replaced by one in
    host memory, unless `replay_buffer.gpu_storage` is set.
    """

    def __init__(
        self,
        *,
        run_id: str,
        secret: bytes,
        num_envs: int,
        allocate: Callable[[StreamSpec, bool], tuple[Replay, int | None]],
        random_frames: Callable[[], int],
        agent_steps: Callable[[], int],
        round_number: Callable[[], int] = lambda: 0,
        gpu_storage: bool | None,
        log: FilteringBoundLogger,
        self_test_s: float = SELF_TEST_S,
    ) -> None:
        """Prepare for the first hello.

        secret: of the run; a hello without it is refused before anything else of it is read.
        allocate: make the replay for a stream, on the learner's GPU if it has one and the second argument is true;
        return it and its memfd, or None for one on a GPU.
        random_frames, agent_steps: return the numbers for the welcome: how many more agent steps a collector acts at
        random, and how many agent steps were collected so far. round_number: returns the round of lockstep.
        gpu_storage: the setting `replay_buffer.gpu_storage`.
        self_test_s: how long a collector that was sent the slab may take until its self-test arrives.
        """
        self._run_id, self._secret, self._num_envs, self._allocate = run_id, secret, num_envs, allocate
        self._random_frames, self._agent_steps, self._log = random_frames, agent_steps, log
        self._round_number = round_number
        self._gpu_storage, self._is_in_use, self._self_test_s = gpu_storage, False, self_test_s
        self.shared: SharedReplay | None = None  # None until the first valid hello

    def welcome(self, hello: Hello, channel: Channel) -> Testing:
        """Answer a hello: grant one chunk for the self-test and send the slab. Raises: Refused."""
        spec = self._checked_spec(hello)
        if self.shared is None:
            try:
                self.shared = SharedReplay(spec, *self._allocate(spec, self._gpu_storage is not False))
            except SettingError as error:  # such a stream needs more memory than there is, or is not the checkpoint's
                raise Refused(str(error)) from error
        return self._offer(self.shared, channel)

    def fall_back(self, channel: Channel, reason: str) -> Testing:
        """Offer a replay in host memory instead of the one on the GPU, which a collector cannot use for this reason.

        The old replay's memory is freed first. Raises: Refused if the replay cannot be replaced.
        """
        shared = self.shared
        assert shared is not None, "memory was refused before any was offered"
        if shared.fd is not None or self._gpu_storage:
            raise Refused(reason)
        if self._is_in_use:
            raise Refused(
                f"{reason}; this run has already used the replay on the GPU, so it cannot change to host memory now: "
                "resume it with that setting"
            )
        self._log.warning(
            "the GPU's replay cannot be shared: the run goes on as with replay_buffer.gpu_storage=false", reason=reason
        )
        shared.replay.free()
        self.shared = SharedReplay(shared.spec, *self._allocate(shared.spec, False))
        return self._offer(self.shared, channel)

    def check_self_test(self, testing: Testing, result: SelfTest) -> float:
        """Compare the pattern's checksum on both sides and return the collector's writing rate in bytes/s.

        Raises: HandoverError if the checksums differ.
        """
        replay = testing.shared.replay
        chunk = replay.chunk(testing.test_row)
        found = checksum(chunk[entry.key] for entry in replay.layout.fields)
        if found != result.checksum:
            raise HandoverError(
                f"the transport's self-test failed: the pattern has checksum {found} in the replay; "
                f"expected {result.checksum} as in the collector; GPU peer access may be broken: "
                "use one GPU for both processes, or set replay_buffer.gpu_storage=false"
            )
        self._is_in_use = True
        return result.num_bytes / max(result.write_s, 1e-9)

    def _offer(self, shared: SharedReplay, channel: Channel) -> Testing:
        """Grant one chunk for the self-test and send the slab.

        Raises: Refused, or HandoverError before the first collector, if CUDA cannot share a slab that must not change.
        """
        replay = shared.replay
        test_row = replay.grant()
        if replay.device.type == "cuda":
            # Queued gradient steps may still sample the rows that the pattern will overwrite. Restarts are rare: wait.
            torch.cuda.current_stream(replay.device).synchronize()
        try:
            uuid, handle = ("", []) if shared.fd is not None else export_cuda_slab(replay.slab)
        except HandoverError as error:
            if self._gpu_storage and not self._is_in_use:
                raise
            return self.fall_back(channel, str(error))
        message = Welcome(
            secret=self._secret,
            transport="cuda_ipc" if shared.fd is None else "memfd",
            num_bytes=replay.slab.numel(),
            capacity=replay.layout.capacity,
            uuid=uuid,
            handle=handle,
            test_row=test_row,
            random_frames=self._random_frames(),
            agent_steps=self._agent_steps(),
            nonce=secrets.randbits(32),
            round_number=self._round_number(),
        )
        # At most one other Welcome precedes this message on the channel, so the socket has room for it.
        channel.send(message, () if shared.fd is None else (shared.fd,), deadline_s=1.0)
        return Testing(channel, shared, test_row, self._self_test_s)

    def _checked_spec(self, hello: Hello) -> StreamSpec:
        """Return what the collector streams. Raises: Refused if it does not fit this run."""
        check_identity(hello, run_id=self._run_id, secret=self._secret)
        try:
            spec = StreamSpec.from_dict(hello.spec)
            for name, entry in spec.obs.items():
                check_entry(name, entry)
        except ValueError as error:
            raise Refused(str(error)) from error
        if spec.num_envs != self._num_envs:
            raise Refused(
                f"the simulator has {spec.num_envs} environments; expected {self._num_envs} as in the settings; "
                "fix the simulator backend"
            )
        if self.shared is not None and spec != self.shared.spec:
            raise Refused(
                f"the collector streams {spec.to_dict()}; expected {self.shared.spec.to_dict()} as at the first hello; "
                "start a new run for another stream"
            )
        return spec


def check_identity(hello: Hello, *, run_id: str, secret: bytes) -> None:
    """Raise Refused if a hello is not from a collector of this run."""
    if hello.protocol != PROTOCOL:
        raise Refused(
            f"the collector speaks protocol {hello.protocol}; expected {PROTOCOL}; "
            "start both processes from one checkout"
        )
    if hello.run_id != run_id:
        raise Refused(
            f"the collector belongs to run {hello.run_id!r}; expected {run_id!r}; "
            "give both processes the same --run-dir"
        )
    if not hmac.compare_digest(hello.secret, secret):
        raise Refused(
            "the hello does not contain the secret of this run; expected the one in the run's folder of sockets; "
            "only a collector that launch starts can join a run"
        )
