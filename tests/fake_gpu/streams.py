"""The order in which the fake GPU does the work of its streams.

By default work is done at once, when it is put on a stream. With FAKE_GPU_STREAM_SEED every stream is a queue, and its
work is done late and in an order that is drawn from the seed: any order that the streams' events allow. A host that
waits (synchronize, a blocking copy) gets exactly what it waited for, and a host that asks (query) lets a little work be
done. Code that forgot to wait for an event then reads memory before it is written, or writes it before it is read, and
its test fails.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], object]
Key = tuple[int, int]  # device and handle of a stream; handle 0 is the device's default stream

FOREIGN_EVENT_S = 60.0  # how long an event of another process may take
IDLE_S = 0.2  # the device works on by itself if the host has not used it for so long
SLEEP_QUERIES = 20  # how often a query finds a sleeping stream asleep

_lock = threading.RLock()
_seed = os.environ.get("FAKE_GPU_STREAM_SEED")
_random = random.Random(f"{_seed}")
_queues: dict[Key, _Queue] = {}
_records: dict[tuple[int, int], Key] = {}  # event and number of the record -> the stream that will complete it
_last_use = 0.0
_failure: Exception | None = None  # of work that was done late; as on a GPU, later calls report it


@dataclass(eq=False)
class _Item:
    """One entry of a queue: work to do, after an event if there is one."""

    work: Work | None = None
    event: tuple[int, int] | None = None  # address and number of the record that must be complete
    after: _Item | None = None  # another entry that must be done
    sleeps: int = 0  # queries that do not get past this entry
    done: bool = False


@dataclass(eq=False)
class _Queue:
    key: Key
    eagerness: float  # how likely its work is done before somebody waits for it
    items: deque[_Item] = field(default_factory=deque)


def deferred() -> bool:
    """Return whether streams are queues."""
    return _seed is not None


def submit(handle: int, device: int, work: Work) -> None:
    """Put work on a stream."""
    if _seed is None:
        work()
    else:
        _put((device, handle), _Item(work))


def join(handle: int, device: int, other: int, other_device: int) -> None:
    """Let a stream wait for everything that is on the other one now."""
    if _seed is None:
        return
    with _lock:
        mark = _Item()
        _put((other_device, other), mark)
        _put((device, handle), _Item(after=mark))


def finish(handle: int, device: int) -> None:
    """Do everything that is on the stream now."""
    if _seed is not None:
        with _lock:
            _run_all(_queue((device, handle)))


def finish_all() -> None:
    """Do everything that is on any stream."""
    with _lock:
        for queue in list(_queues.values()):
            _run_all(queue)


def reseed(seed: int) -> None:
    """Finish all work, and draw the order of later work from another seed. If work is done at once, do nothing."""
    if _seed is None:
        return
    with _lock:
        finish_all()
        _random.seed(seed)
        _queues.clear()


def sleep(handle: int, device: int) -> None:
    """Let the stream be busy until the host waits for it, or has asked several times."""
    if _seed is not None:
        _put((device, handle), _Item(sleeps=SLEEP_QUERIES))


def count_bytes(*, to_device: bool, number: int) -> None:
    """Count a copy that operators.py does."""
    counter("fake_gpu_bytes_to_device" if to_device else "fake_gpu_bytes_to_host").value += number


def counter(name: str) -> ctypes.c_long:
    """Return one of the runtime's counters, see runtime/fake.h."""
    return ctypes.c_long.in_dll(_runtime(), name)


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libcudart.so.13")


def _queue(key: Key) -> _Queue:
    if key not in _queues:
        _queues[key] = _Queue(key, eagerness=_random.choice((0.0, 0.1, 0.5, 0.9)))
    return _queues[key]


def _put(key: Key, item: _Item) -> None:
    with _lock:
        if _failure is not None:
            raise RuntimeError("fake GPU: work that was done late has failed") from _failure
        _queue(key).items.append(item)
        _do_some()


def _do_some() -> None:
    """Do some work although the host does not wait for it."""
    global _last_use
    _last_use = time.monotonic()
    for queue in _random.sample(list(_queues.values()), len(_queues)):
        while queue.items and _random.random() < queue.eagerness and _ready(queue.items[0]):
            _run_first(queue)


def _ready(item: _Item) -> bool:
    if item.sleeps > 0:
        return False
    if item.after is not None and not item.after.done:
        return False
    return item.event is None or not _is_open(*item.event)


def _is_open(event: int, number: int) -> bool:
    """Return whether this record of an event is not complete. A later one, on another stream, may be."""
    return (event, number) in _records or _completed(event) < number


def _run_first(queue: _Queue) -> None:
    """Do the first work of the queue, after everything that it waits for."""
    item = queue.items[0]
    if item.event is not None:
        _complete(*item.event)
    if item.after is not None:
        while (other := _queue_of(item.after)) is not None:
            _run_first(other)
    if queue.items and queue.items[0] is item:  # what it waited for may have run it
        queue.items.popleft()
        item.done = True
        if item.work is not None:
            _do(item.work)


def _do(work: Work) -> None:
    """Do the work. The runtime cannot pass its error on, so it is kept for the next call of Python."""
    global _failure
    try:
        work()
    except Exception as error:
        _failure = _failure or error


def _run_all(queue: _Queue) -> None:
    global _last_use
    _last_use = time.monotonic()
    last = queue.items[-1] if queue.items else None
    while last is not None and not last.done:
        _run_first(queue)
        _do_some()


def _completed(event: int) -> int:
    return _runtime().fake_gpu_event_completed(ctypes.c_void_p(event))


def _complete(event: int, number: int) -> None:
    """Do what must be done before the record of the event is complete. An event of another process is waited for."""
    end = time.monotonic() + FOREIGN_EVENT_S
    while _is_open(event, number):
        key = _records.get((event, number))
        if key is not None:
            _run_first(_queues[key])
            _do_some()
        elif time.monotonic() > end:
            raise RuntimeError("fake GPU: an event of another process did not complete in time")
        else:
            _do_some()
            time.sleep(0.001)


# What the runtime calls, see runtime/fake.h.


def _on_copy(to: int, source: int, number: int, handle: int, device: int) -> None:
    if _runtime().fake_gpu_is_unpinned(ctypes.c_void_p(source)):  # CUDA reads unpinned memory before the call returns
        content = ctypes.string_at(source, number)
        submit(handle, device, lambda: ctypes.memmove(to, content, number))
    else:
        submit(handle, device, lambda: ctypes.memmove(to, source, number))


def _on_fill(to: int, value: int, number: int, handle: int, device: int) -> None:
    submit(handle, device, lambda: ctypes.memset(to, value, number))


def _on_record(event: int, number: int, handle: int, device: int) -> None:
    with _lock:
        _records[event, number] = (device, handle)

        def complete() -> None:
            del _records[event, number]
            _runtime().fake_gpu_complete_event(ctypes.c_void_p(event), ctypes.c_uint64(number))

        _put((device, handle), _Item(complete))


def _on_wait(event: int, number: int, handle: int, device: int) -> None:
    with _lock:
        if _completed(event) < number:
            _put((device, handle), _Item(event=(event, number)))


def _on_run_event(event: int, number: int, to_the_end: int) -> None:
    with _lock:
        if to_the_end:
            _complete(event, number)
            return
        _do_some()
        key = _records.get((event, number))
        if key is not None and _completed(event) < number:
            _ask(_queues[key])


def _ask(queue: _Queue) -> None:
    """Let a query have its effect: one piece of work is done, so that asking often enough gets there.

    If the stream waits for another one, the piece is done there.
    """
    if not queue.items:
        return
    item = queue.items[0]
    key = _records.get(item.event) if item.event is not None and not _ready(item) else None
    other = _queues[key] if key is not None else _queue_of(item.after)
    if item.sleeps > 0:
        item.sleeps -= 1
    elif other is not None:
        _ask(other)
    elif _ready(item):
        _run_first(queue)


def _queue_of(item: _Item | None) -> _Queue | None:
    """Return the queue that holds an entry, or None if the entry is done."""
    return None if item is None or item.done else next(queue for queue in _queues.values() if item in queue.items)


def _on_run_stream(handle: int, device: int, to_the_end: int) -> int:
    with _lock:
        queue = _queue((device, handle))
        if to_the_end:
            _run_all(queue)
        else:
            _ask(queue)
        return not queue.items


def _on_run_device(device: int) -> None:
    with _lock:
        for queue in [queue for key, queue in _queues.items() if key[0] == device]:
            _run_all(queue)


def _on_call(function: int, argument: int, handle: int, device: int) -> None:
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    submit(handle, device, lambda: call(argument))


_P, _N, _I = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
_SIGNATURES: list[tuple[str, Any, Any]] = [  # the order of the fields of Hooks
    ("copy", _on_copy, ctypes.CFUNCTYPE(None, _P, _P, _N, _N, _I)),
    ("fill", _on_fill, ctypes.CFUNCTYPE(None, _P, _I, _N, _N, _I)),
    ("record", _on_record, ctypes.CFUNCTYPE(None, _N, _N, _N, _I)),
    ("wait", _on_wait, ctypes.CFUNCTYPE(None, _N, _N, _N, _I)),
    ("run_event", _on_run_event, ctypes.CFUNCTYPE(None, _N, _N, _I)),
    ("run_stream", _on_run_stream, ctypes.CFUNCTYPE(_I, _N, _I, _I)),
    ("run_device", _on_run_device, ctypes.CFUNCTYPE(None, _I)),
    ("call", _on_call, ctypes.CFUNCTYPE(None, _N, _N, _N, _I)),
]
_hooks: list[Any] = []  # keeps the callbacks alive


def _work_while_idle() -> None:
    """Do work while the host does something else, so that another process never waits in vain."""
    while True:
        time.sleep(IDLE_S)
        with _lock:
            if time.monotonic() - _last_use > IDLE_S:
                for queue in list(_queues.values()):
                    if queue.items:
                        _ask(queue)


def _stop() -> None:
    with _lock:
        _runtime().fake_gpu_set_hooks(None)
        finish_all()
    if _failure is not None:
        traceback.print_exception(_failure)
        os._exit(1)  # an error in a function of atexit would not change the exit code


def install() -> None:
    """Give the runtime its queues, if streams are queues."""
    if _seed is None:
        return
    runtime = _runtime()
    runtime.fake_gpu_event_completed.restype = ctypes.c_uint64

    class Hooks(ctypes.Structure):
        _fields_ = [(name, kind) for name, _, kind in _SIGNATURES]

    hooks = Hooks(*(kind(function) for _, function, kind in _SIGNATURES))
    _hooks.append(hooks)
    runtime.fake_gpu_set_hooks(ctypes.byref(hooks))
    threading.Thread(target=_work_while_idle, daemon=True).start()
    atexit.register(_stop)
