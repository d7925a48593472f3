"""What a process reports to launch: its phase, a counter that shows that it moves, and its latest numbers.

A progress file is one page with two slots; the writer fills the slot that is not current, so a reader (and a writer
killed in the middle) always leaves one whole slot:

    offset 0     slot 0 | magic crc32 length | pid generation counter changed_at phase_since phase | status | refusal |
    offset 8192  slot 1 | the same                                                                                   |

The status is a JSON object, the refusal is text: why this process cannot work, empty as long as it can.

Example: generation 6 lies in slot 0, generation 7 in slot 1. A reader that meets a slot whose checksum does not fit
(the writer was in it) takes the other, and reads again if both moved under it.
"""

from __future__ import annotations

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

MAX_STATUS_BYTES = 3072
MAX_REFUSAL_BYTES = 3072
HELD_GB = "rss_gb"  # in a collector's status: the memory that was held against collector.max_rss_gb last
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
_SLOT_BYTES = 8192
_MAGIC = b"TNDM"
_HEAD = struct.Struct("<4sII")
_BODY = struct.Struct("<QQQdd24sI")  # the last is the number of bytes of the status


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
    refusal: str = ""  # why this process ends with ExitCode.REFUSED


class Progress:
    """The writer's side: one process tells launch its phase, that it moves, and its latest numbers."""

    def __init__(self, page: mmap.mmap, pid: int) -> None:
        self._page, self._pid = page, pid
        self._generation = self._counter = 0
        self._status, self._refusal = b"{}", b""
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

    def refuse(self, reason: str) -> None:
        """Tell launch why this process cannot work; what is longer than MAX_REFUSAL_BYTES is cut off."""
        self._refusal = reason.encode()[:MAX_REFUSAL_BYTES]
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
    pid, generation, counter, changed_at, phase_since, phase, status_bytes = _BODY.unpack_from(payload)
    end = _BODY.size + status_bytes
    name, status = phase.rstrip(b"\0").decode(), json.loads(payload[_BODY.size : end])
    refusal = payload[end:].decode(errors="replace")
    return Snapshot(name, counter, changed_at, phase_since, pid, generation, status, refusal)


def overdue_s(snapshot: Snapshot, deadlines: DeadlineSettings, *, now: float, watched_since: float) -> float | None:
    """Seconds past the deadline of its phase, or None while it keeps it.

    `watched_since`: when the watcher itself last resumed; a process cannot be late while its watcher slept too.
    """
    limit = getattr(deadlines, PHASE_DEADLINES[snapshot.phase])
    late = now - max(snapshot.changed_at, watched_since) - limit
    return late if late > 0 else None
