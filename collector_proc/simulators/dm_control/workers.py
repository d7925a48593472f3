"""Worker processes that step dm_control environments. Actions and arrivals are exchanged through one memfd.

    collector                                   worker w (python -m collector_proc.simulators.dm_control.workers)
      socketpair, Popen          ->               builds environments w*n .. w*n + n - 1
                                 <- spec (JSON)
      memfd by SCM_RIGHTS        ->               maps it
                                 <- "k"
      "r" or "s", actions in it  ->               resets or steps, writes its own rows
                                 <- "k", or "!" and the text of the exception

The memfd has no name, so nothing is left in /dev/shm. End of file on the socket means that the other process has ended.
A worker imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from collector_proc.simulators.dm_control.environment import SuiteEnvironment, SuitePlan, renderer_variables, run_tick
from collector_proc.simulators.dm_control.tick_buffer import TickBuffer, tick_bytes
from shared.errors import SimulatorError
from shared.lifetime import HELD_SIGNALS, die_with_parent
from shared.stream import StreamSpec

MESSAGE_BYTES = 65536
CLOSE_S = 3.0
SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1")
ROOT = Path(__file__).resolve().parents[3]


class WorkerPool:
    """`num_workers` processes with `num_envs` environments each, which `run` steps at the same time.

    Raises: SimulatorError, here and in `run`, if a worker fails, dies, or does not answer before its deadline.
    """

    def __init__(self, plan: SuitePlan, *, num_workers: int, num_envs: int, start_s: float, step_s: float) -> None:
        self._num_envs, self._step_s, self._num_ticks = num_envs, step_s, 0
        self._processes: list[subprocess.Popen] = []
        self._sockets: list[socket.socket] = []
        self._poll = select.poll()
        self._worker_of: dict[int, int] = {}
        try:
            for worker in range(num_workers):
                self._start(plan, worker)
            deadline = time.monotonic() + start_s
            self.spec = self._spec_of_all(self._gather("build its environments", deadline, "start_s", start_s))
            self.tick = self._share_memory()
            self._gather("map the shared memory", deadline, "start_s", start_s)
        except BaseException:
            self._end(grace_s=0.0)  # workers that still build environments do not notice that their sockets close
            raise

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers, until `close`."""
        return [process.pid for process in self._processes]

    def run(self, *, reset: bool) -> None:
        """Make one tick: every worker reads its actions from `tick` and writes its arrivals into it."""
        for worker, link in enumerate(self._sockets):
            try:
                link.send(b"r" if reset else b"s")
            except OSError:
                self._receive(worker)  # raises with the reason, if the worker has sent one
                raise self._death(worker) from None
        self._gather("reset" if reset else "step", time.monotonic() + self._step_s, "step_s", self._step_s)
        self._num_ticks += 1

    def close(self) -> None:
        """End every worker: close its socket, and after three seconds kill the workers that still run."""
        self._end(grace_s=CLOSE_S)

    def _end(self, *, grace_s: float) -> None:
        """End every worker: close its socket, and after `grace_s` seconds kill the workers that still run."""
        for link in self._sockets:
            link.close()
        self._sockets.clear()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process in a system call ends after it
                process.wait(CLOSE_S)
        self._processes.clear()

    def _start(self, plan: SuitePlan, worker: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets.append(ours)
        self._worker_of[ours.fileno()] = worker
        self._poll.register(ours, select.POLLIN)
        first = worker * self._num_envs
        job = {
            "plan": asdict(plan),
            "envs": [first, first + self._num_envs],
            "fd": theirs.fileno(),
            "parent": os.getpid(),
        }
        command = [sys.executable, "-m", "collector_proc.simulators.dm_control.workers", json.dumps(job)]
        variables = {**os.environ, **SINGLE_THREAD, **renderer_variables(plan.from_pixels)}
        with theirs:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._processes.append(process)

    def _spec_of_all(self, answers: list[bytes]) -> StreamSpec:
        """Return the stream of all workers. They have equal environments, so the first answer is enough."""
        first = StreamSpec.from_dict(json.loads(answers[0]))
        return StreamSpec(len(answers) * self._num_envs, first.obs, first.action_dim)

    def _share_memory(self) -> TickBuffer:
        num_bytes = tick_bytes(self.spec)
        fd = os.memfd_create("tandem-tick", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, num_bytes)
            header = json.dumps(self.spec.to_dict()).encode()
            for worker, link in enumerate(self._sockets):
                try:
                    socket.send_fds(link, [header], [fd])
                except OSError:
                    self._receive(worker)
                    raise self._death(worker) from None
            return TickBuffer(self.spec, mmap.mmap(fd, num_bytes))
        finally:
            os.close(fd)

    def _gather(self, what: str, deadline: float, setting: str, limit_s: float) -> list[bytes]:
        """Wait for one answer of every worker, and return the answers in the order of the workers.

        what: what a worker should do before it answers. setting: the deadline's name. Raises: SimulatorError.
        """
        answers: dict[int, bytes] = {}
        while len(answers) < len(self._sockets):
            ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                worker = next(w for w in range(len(self._sockets)) if w not in answers)
                raise SimulatorError(
                    f"{self._name(worker)} did not {what} within {limit_s:g} s; expected every worker to answer, but "
                    f"{len(answers)} of {len(self._sockets)} did after {self._num_ticks} complete ticks; "
                    f"raise deadlines.{setting}, or find out why the simulator hangs"
                )
            for fd, _ in ready:
                worker = self._worker_of[fd]
                answers[worker] = self._receive(worker)
        return [answers[worker] for worker in range(len(self._sockets))]

    def _receive(self, worker: int) -> bytes:
        """Return a worker's message. Raises: SimulatorError if the worker failed or died."""
        try:
            message = self._sockets[worker].recv(MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            raise self._death(worker)
        if message.startswith(b"!"):
            raise SimulatorError(f"{self._name(worker)} failed: {message[1:].decode(errors='replace')}")
        return message

    def _death(self, worker: int) -> SimulatorError:
        """Return the error for a worker that died."""
        process = self._processes[worker]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_S)  # the exit status is there a moment after the end of file
        return SimulatorError(
            f"{self._name(worker)}, process {process.pid}, died with exit code {process.returncode} "
            f"after {self._num_ticks} ticks; expected it to answer every tick; "
            "read what it wrote to stderr, and the kernel log if the code is -9"
        )

    def _name(self, worker: int) -> str:
        first = worker * self._num_envs
        return f"worker {worker} (environments {first}..{first + self._num_envs - 1})"


def _serve(link: socket.socket, plan: SuitePlan, indices: range) -> None:
    """Build the environments and make a tick for every command, until the collector closes the socket."""
    environments = [SuiteEnvironment(plan, index) for index in indices]
    spec = StreamSpec(len(environments), environments[0].obs, environments[0].action_dim)
    link.send(json.dumps(spec.to_dict()).encode())
    header, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 1)
    if not header:
        return
    spec = StreamSpec.from_dict(json.loads(header))
    tick = TickBuffer(spec, mmap.mmap(fds[0], tick_bytes(spec)))
    os.close(fds[0])
    link.send(b"k")
    while command := link.recv(1):
        run_tick(environments, tick, reset=command == b"r")
        link.send(b"k")
    for environment in environments:
        environment.close()


def main() -> NoReturn:
    """Run one worker process until the collector closes the socket."""
    job = json.loads(sys.argv[1])
    die_with_parent(job["parent"])
    # Only the collector handles these signals. It ends a worker by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for signum in HELD_SIGNALS:  # a scheduler may send them to every process of a job
        signal.signal(signum, signal.SIG_IGN)
    link = socket.socket(fileno=job["fd"])
    try:
        _serve(link, SuitePlan(**job["plan"]), range(*job["envs"]))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the collector ended while this worker answered
    except Exception as error:
        text = f"{error}\n{traceback.format_exc()[-4000:]}" if not isinstance(error, SimulatorError) else str(error)
        with contextlib.suppress(OSError):
            link.send(b"!" + text.encode()[: MESSAGE_BYTES // 2])
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
