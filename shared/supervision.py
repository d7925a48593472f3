"""How launch watches a process and ends it: progress counters, stop flags, stack dumps, an orderly stop.

A progress file is one page with two slots; the writer fills the slot that is not current, so a reader (and a writer
killed in the middle) always leaves one whole slot:

    offset 0     slot 0 | magic crc32 length | pid generation counter changed_at phase_since phase | status (JSON) |
    offset 4096  slot 1 | the same                                                                                 |

Example: generation 6 lies in slot 0, generation 7 in slot 1. A reader that meets a slot whose checksum does not fit
(the writer was in it) takes the other, and reads again if both moved under it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from shared.config import DeadlineSettings

MAX_STATUS_BYTES = 3072
LAUNCH_PID = "TANDEM_LAUNCH_PID"
SIM_GPU_INDEX = "TANDEM_SIM_GPU_INDEX"  # set by launch: the simulator's GPU as nvidia-smi counts
OUTGROWN = 75  # exit code of a collector that held more than collector.max_rss_gb, and made room for the next one
HELD_GB = "rss_gb"  # in a collector's status: the memory that was held against collector.max_rss_gb last
OOM_SCORE = 500  # of a process that can be replaced; 0 is usual, 1000 the most
KILL_S = 30.0  # how long the kernel may take to end a process after SIGKILL

# Every phase a process may report, and the setting that says how long its counter may stand still in it.
PHASE_DEADLINES = {
    "starting": "start_s",
    "simulator": "start_s",
    "networks": "start_s",
    "hello": "start_s",
    "attaching": "start_s",
    "self-test": "start_s",
    "waiting": "step_s",
    "prefill": "step_s",
    "collecting": "step_s",
    "training": "step_s",
    "evaluating": "step_s",
    "publishing": "step_s",
    "compiling": "compile_s",
    "resuming": "save_s",
    "saving": "save_s",
    "finishing": "save_s",
    "stopping": "save_s",
}
LAST_PHASES = ("finishing", "stopping")  # a process in one of these is about to end by itself

_SLOT_BYTES = 4096
_MAGIC = b"TNDM"
# Open for the life of the process: faulthandler writes to the descriptor from inside a signal handler.
_dump_files: list[IO[str]] = []
_HEAD = struct.Struct("<4sII")
_BODY = struct.Struct("<QQQdd24s")


@dataclass(frozen=True)
class Snapshot:
    """One process's own account; times are time.monotonic() seconds, which all processes of a machine share."""

    phase: str
    counter: int
    changed_at: float  # of the last advance() or phase()
    phase_since: float
    pid: int
    generation: int  # writes so far
    status: Mapping[str, Any] = field(default_factory=dict)


class Progress:
    """The writer's side: one process tells launch its phase, that it moves, and its latest numbers."""

    def __init__(self, page: mmap.mmap, pid: int) -> None:
        self._page, self._pid = page, pid
        self._generation = self._counter = 0
        self._status = b"{}"
        self._phase = "starting"
        self._phase_since = self._changed_at = time.monotonic()
        self._write()

    @staticmethod
    def create(path: Path, pid: int | None = None) -> Progress:
        """A fresh file in phase "starting", put in place of an older one at once."""
        partial = path.with_name(path.name + ".partial")
        # Written out rather than left sparse: a page without a block turns a full disk into SIGBUS.
        partial.write_bytes(bytes(2 * _SLOT_BYTES))
        with partial.open("r+b") as file:
            page = mmap.mmap(file.fileno(), 2 * _SLOT_BYTES)
        progress = Progress(page, os.getpid() if pid is None else pid)
        os.replace(partial, path)
        return progress

    def phase(self, name: str) -> None:
        """Enter a phase; its deadline (PHASE_DEADLINES) counts from now. Raises: ValueError on an unknown name."""
        if name not in PHASE_DEADLINES:
            raise ValueError(f"unknown phase {name!r}; wanted one of {', '.join(PHASE_DEADLINES)}; add it there")
        self._phase, self._phase_since = name, time.monotonic()
        self.advance()

    def advance(self) -> None:
        """Say that this process moves: after each tick or step, and inside every loop that waits."""
        self._counter += 1
        self._changed_at = time.monotonic()
        self._write()

    def status(self, numbers: Mapping[str, Any]) -> None:
        """Replace the numbers a user sees. Raises: ValueError above 3 KiB of JSON."""
        encoded = json.dumps(dict(numbers)).encode()
        if len(encoded) > MAX_STATUS_BYTES:
            raise ValueError(
                f"status of {len(encoded)} bytes with {len(numbers)} keys; wanted at most {MAX_STATUS_BYTES}; "
                f"report fewer keys"
            )
        self._status = encoded
        self._write()

    def _write(self) -> None:
        self._generation += 1
        body = _BODY.pack(
            self._pid, self._generation, self._counter, self._changed_at, self._phase_since, self._phase.encode()
        )
        payload = body + self._status
        start = self._generation % 2 * _SLOT_BYTES
        self._page[start : start + _HEAD.size + len(payload)] = (
            _HEAD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload
        )


def read(path: Path) -> Snapshot:
    """The newest whole account in a progress file.

    Raises: OSError if there is no file, ValueError if twenty reads met no whole slot: the file is not one of ours.
    """
    raw = b""
    for _ in range(20):
        raw = path.read_bytes()
        slots = [_parse_slot(raw[start : start + _SLOT_BYTES]) for start in (0, _SLOT_BYTES)]
        whole = [slot for slot in slots if slot is not None]
        if whole:
            return max(whole, key=lambda snapshot: snapshot.generation)
        time.sleep(0.001)
    raise ValueError(f"{path} holds no whole progress slot in {len(raw)} bytes; wanted one written by Progress.create")


def _parse_slot(raw: bytes) -> Snapshot | None:
    if len(raw) < _HEAD.size + _BODY.size:
        return None
    magic, checksum, length = _HEAD.unpack_from(raw)
    payload = raw[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    pid, generation, counter, changed_at, phase_since, phase = _BODY.unpack_from(payload)
    name, status = phase.rstrip(b"\0").decode(), json.loads(payload[_BODY.size :])
    return Snapshot(name, counter, changed_at, phase_since, pid, generation, status)


def overdue_s(snapshot: Snapshot, deadlines: DeadlineSettings, *, now: float, watched_since: float) -> float | None:
    """Seconds past the deadline of its phase, or None while it keeps it.

    `watched_since`: when the watcher itself last resumed; a process cannot be late while its watcher slept too.
    """
    limit = getattr(deadlines, PHASE_DEADLINES[snapshot.phase])
    late = now - max(snapshot.changed_at, watched_since) - limit
    return late if late > 0 else None


def die_with_parent() -> None:
    """Tie this process's life to launch's: SIGKILL as soon as its parent ends, SystemExit if it already has.

    Run by hand, without launch, the parent is the shell.
    """
    pr_set_pdeathsig = 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed; wanted Linux 2.1.57 or newer")
    expected = os.environ.get(LAUNCH_PID)
    if expected is not None and os.getppid() != int(expected):
        raise SystemExit(f"launch (pid {expected}) ended before this process started; start launch.py again")


def die_first_when_memory_ends() -> None:
    """Let the kernel, short of memory, kill this process and its children before others; as far as it permits."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(max(OOM_SCORE, int(score.read_text()))))


class StopFlag:
    """Set once SIGTERM, SIGINT or SIGHUP arrives; loops poll `requested` and end in good order."""

    def __init__(self) -> None:
        self.requested = False
        self.signum: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP (a closed terminal), again if a simulator has taken them meanwhile."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            before = signal.signal(signum, self._set)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.signum = self.signum or signum
        self.count += 1


def install_stop_flag() -> StopFlag:
    flag = StopFlag()
    flag.install()
    return flag


def enable_stack_dumps(crash_dir: Path, process: str) -> Path:
    """Where SIGUSR1 (and a fatal signal) writes every thread's stack: `crash/<process>.stacks`."""
    path = crash_dir / f"{process}.stacks"
    file = path.open("a")
    faulthandler.enable(file=file, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    _dump_files.append(file)
    return path


def renew_stack_dumps() -> None:
    """Take the fatal signals back from a simulator that has caught them: they dump the stacks and end the process."""
    faulthandler.disable()
    faulthandler.enable(file=_dump_files[-1] if _dump_files else 2, all_threads=True)


class ChildProcess:
    """One started process: leader of its own group, its output in a file, never left as a zombie."""

    def __init__(
        self, name: str, command: Sequence[str], *, output: Path, env: Mapping[str, str], cwd: Path, note: str = ""
    ) -> None:
        self.name, self.command, self.output = name, list(command), output
        self.returncode: int | None = None
        with output.open("ab") as file:
            file.write(f"--- {name} {note} {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def poll(self) -> int | None:
        """None while it runs, else its exit code; then its whole group is dead and it is reaped."""
        if self.returncode is None and self._has_ended():
            # The group goes before the reap: only an unreaped leader keeps its number from being given away.
            self._signal_group(signal.SIGKILL)
            self.returncode = self._popen.wait()
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end. Only the leader: workers that died first would look like a failure to it."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Ask for a stack dump and give it a second to be written."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGUSR1)
            self.wait(1.0)

    def wait(self, timeout_s: float, *, hurry: Callable[[], bool] = lambda: False) -> int | None:
        """Its exit code, or None if it still runs after `timeout_s` or as soon as `hurry()` says so."""
        end = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < end and not hurry():
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> int | None:
        """SIGKILL to the whole group, then reap; None only if the kernel could not end it within 30 s."""
        if self.poll() is None:
            self._signal_group(signal.SIGKILL)
        return self.wait(KILL_S)

    def stop(self, timeout_s: float, *, hurry: Callable[[], bool] = lambda: False) -> int | None:
        """Orderly end: SIGTERM, `timeout_s` of patience unless `hurry()`, SIGKILL to the group, reap."""
        self.terminate()
        self.wait(timeout_s, hurry=hurry)
        return self.kill()

    def last_output(self, num_lines: int = 20) -> list[str]:
        """The end of what it wrote to stdout and stderr."""
        with self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def _has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)
