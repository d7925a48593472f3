"""The progress file, through which a process reports to launch: its phase, a counter that moves, its latest numbers.

A progress file is one page with two slots. The writer always fills the slot that is not current. So one whole slot
remains at every instant, also if the writer is killed in the middle of a write:

    offset 0     slot 0 | magic crc32 length | pid generation counter changed_at phase_since phase | status | refusal |
    offset 8192  slot 1 | the same                                                                                   |

The status is a JSON object with the fields of `LearnerStatus` or `CollectorStatus`. The refusal is the text of the
error with which the process ends; it is empty for a process that works.

Example: slot 0 holds generation 6 and slot 1 holds generation 7. A reader that finds a slot with a wrong checksum (the
writer was filling it) takes the other slot. If both slots changed while it was reading, it reads the page again.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import DeadlineSettings
from shared.metrics import CollectorStatus, LearnerStatus

MAX_STATUS_BYTES = 3072
MAX_REFUSAL_BYTES = 3072
# Every phase that a process may report, and the setting of `deadlines` that limits how long its counter may not move.
PHASE_DEADLINES = {
    "starting": "start_s",
    "simulator": "start_s",
    "hello": "start_s",
    "self-test": "start_s",
    "waiting": "step_s",
    "prefill": "step_s",
    "collecting": "step_s",
    "training": "step_s",
    "compiling": "compile_s",
    "resuming": "save_s",
    "saving": "save_s",
    "stopping": "save_s",
}
LAST_PHASES = ("stopping",)  # a process in one of these phases is about to end without being asked again
_SLOT_BYTES = 8192
_MAGIC = b"TNDM"
_HEAD = struct.Struct("<4sII")
_BODY = struct.Struct("<QQQdd24sI")  # the last field is the number of bytes of the status
_MAX_READS = 20


@dataclass(frozen=True)
class Snapshot:
    """What a process reported last. Times are time.monotonic() seconds, which all processes of a machine share."""

    phase: str
    counter: int
    changed_at: float  # when advance() or phase() was called last
    phase_since: float
    pid: int
    generation: int  # number of writes so far
    status: Mapping[str, Any] = field(default_factory=dict)  # `shared.metrics.read_status` makes a dataclass of it
    refusal: str = ""  # the error with which this process ends, with ExitCode.REFUSED or FAILED; empty without one


class Progress:
    """The writer's side of a progress file."""

    def __init__(self, page: mmap.mmap, pid: int) -> None:
        self._page, self._pid = page, pid
        self._generation = self._counter = 0
        self._status, self._refusal = b"{}", b""
        self._phase = "starting"
        self._phase_since = self._changed_at = time.monotonic()
        self._write()

    @staticmethod
    def create(path: Path, pid: int | None = None) -> Progress:
        """Return the writer of a new file in phase "starting". The file replaces an older one in a single step."""
        partial = path.with_name(path.name + ".partial")
        # Write zeros instead of leaving the file sparse: without allocated blocks, a full disk would cause SIGBUS.
        partial.write_bytes(bytes(2 * _SLOT_BYTES))
        with partial.open("r+b") as file:
            page = mmap.mmap(file.fileno(), 2 * _SLOT_BYTES)
        progress = Progress(page, os.getpid() if pid is None else pid)
        os.replace(partial, path)
        return progress

    def phase(self, name: str) -> None:
        """Enter a phase; its deadline (see PHASE_DEADLINES) starts now. Raises: ValueError if the name is unknown."""
        if name not in PHASE_DEADLINES:
            raise ValueError(
                f"unknown phase {name!r}; expected one of {', '.join(PHASE_DEADLINES)}; add it to PHASE_DEADLINES"
            )
        self._phase, self._phase_since = name, time.monotonic()
        self.advance()

    def advance(self) -> None:
        """Report that this process moves. Call it after each tick or step, and inside every loop that waits."""
        self._counter += 1
        self._changed_at = time.monotonic()
        self._write()

    def status(self, status: LearnerStatus | CollectorStatus) -> None:
        """Replace the numbers that launch shows. Raises: ValueError if they take more than MAX_STATUS_BYTES as JSON."""
        content = dataclasses.asdict(status)
        encoded = json.dumps(content).encode()
        if len(encoded) > MAX_STATUS_BYTES:
            raise ValueError(
                f"the status takes {len(encoded)} bytes with {len(content)} fields; expected at most "
                f"{MAX_STATUS_BYTES}; report fewer fields"
            )
        self._status = encoded
        self._write()

    def refuse(self, reason: str) -> None:
        """Report the error with which this process ends. It is cut after MAX_REFUSAL_BYTES, between two characters."""
        encoded = reason.encode(errors="replace")[:MAX_REFUSAL_BYTES]
        self._refusal = encoded.decode(errors="ignore").encode()
        self._write()

    def _write(self) -> None:
        self._generation += 1
        body = _BODY.pack(
            self._pid,
            self._generation,
            self._counter,
            self._changed_at,
            self._phase_since,
            self._phase.encode(),
            len(self._status),
        )
        payload = body + self._status + self._refusal
        start = self._generation % 2 * _SLOT_BYTES
        self._page[start : start + _HEAD.size + len(payload)] = (
            _HEAD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload
        )


def read(path: Path) -> Snapshot:
    """Return the newest whole snapshot in a progress file.

    Raises: OSError if there is no such file; ValueError if no read finds a whole slot, so it is not a progress file.
    """
    raw = b""
    for _ in range(_MAX_READS):
        raw = path.read_bytes()
        slots = [_parse_slot(raw[start : start + _SLOT_BYTES]) for start in (0, _SLOT_BYTES)]
        whole = [slot for slot in slots if slot is not None]
        if whole:
            return max(whole, key=lambda snapshot: snapshot.generation)
        time.sleep(0.001)
    raise ValueError(
        f"{path} holds no whole progress slot in {len(raw)} bytes; expected a file of Progress.create; remove it"
    )


def _parse_slot(raw: bytes) -> Snapshot | None:
    """Return the snapshot in one slot, or None if the slot is empty or only partly written."""
    if len(raw) < _HEAD.size + _BODY.size:
        return None
    magic, checksum, length = _HEAD.unpack_from(raw)
    payload = raw[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    pid, generation, counter, changed_at, phase_since, phase, status_bytes = _BODY.unpack_from(payload)
    end = _BODY.size + status_bytes
    name, status = phase.rstrip(b"\0").decode(), json.loads(payload[_BODY.size : end])
    return Snapshot(name, counter, changed_at, phase_since, pid, generation, status, payload[end:].decode())


def overdue_s(snapshot: Snapshot, deadlines: DeadlineSettings, *, now: float, watched_since: float) -> float | None:
    """Return by how many seconds a process exceeds the deadline of its phase, or None if it does not.

    `watched_since` is the time at which the watcher itself started or was last resumed. Time before it does not count,
    because a suspended machine suspends the watched process too.
    """
    limit = getattr(deadlines, PHASE_DEADLINES[snapshot.phase])
    late = now - max(snapshot.changed_at, watched_since) - limit
    return late if late > 0 else None
