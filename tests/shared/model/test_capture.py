"""The order in which a capture calls torch.cuda, and a real graph on a GPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shared.model.capture import WARM_UPS, capture

CPU = torch.device("cpu")


class RecordedCuda:
    """Replaces the parts of torch.cuda that a capture uses. They append their names to `events` and do nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.error_mode = ""
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: RecordedGraph(self.events))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: RecordedStream(self.events, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: RecordedStream(self.events, "current"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.events.append("empty cache"))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.error_mode = capture_error_mode
        self.events.append("begin")
        yield
        self.events.append("end")


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._events.append("register generator")

    def replay(self) -> None:
        self._events.append("replay")


class RecordedStream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, events: list[str], name: str) -> None:
        self._events, self.name = events, name

    def wait_stream(self, other: RecordedStream) -> None:
        self._events.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._events.append("synchronise")


@pytest.mark.parametrize("shared_process", [False, True])
def test_a_capture_warms_up_on_a_side_stream_and_returns_the_captured_result(shared_process, monkeypatch):
    cuda = RecordedCuda(monkeypatch)
    runs: list[bool] = []  # whether Python's garbage collector was on in each run

    def function() -> int:
        cuda.events.append("run")
        runs.append(gc.isenabled())
        return len(runs)

    launch, result = capture(function, CPU, shared_process=shared_process, generators=[torch.Generator()])
    launch()
    released = [] if shared_process else ["synchronise", "empty cache"]
    assert cuda.events == [
        *("register generator", "side waits for current", *["run"] * WARM_UPS, *released),
        *("begin", "run", "end", "current waits for side", "replay"),
    ]
    assert result == WARM_UPS + 1 and runs == [True] * WARM_UPS + [False] and gc.isenabled()
    assert cuda.error_mode == ("thread_local" if shared_process else "global")


def test_the_garbage_collector_is_on_again_after_a_capture_that_failed(monkeypatch):
    RecordedCuda(monkeypatch)

    def function() -> None:
        if not gc.isenabled():
            raise RuntimeError("cannot be captured")

    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(function, CPU, shared_process=False)
    assert gc.isenabled()


def test_a_capture_in_a_process_of_its_own_refuses_to_recompile(monkeypatch):
    RecordedCuda(monkeypatch)
    torch._dynamo.reset()
    compiled, runs = torch.compile(lambda x: x + 1, dynamic=False, backend="eager"), []

    def function() -> torch.Tensor:
        runs.append(None)
        return compiled(torch.zeros(2 if len(runs) <= WARM_UPS else 3))

    with pytest.raises(RuntimeError, match="recompile"):
        capture(function, CPU, shared_process=False)
    runs.clear()
    capture(function, CPU, shared_process=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shared_process", [False, True])
def test_launching_a_graph_repeats_the_function_on_the_present_content_of_its_inputs(shared_process):
    device = torch.device("cuda", 0)
    x = torch.ones(3, device=device)
    launch, doubled = capture(lambda: x * 2, device, shared_process=shared_process)
    x.fill_(5.0)
    launch()
    assert doubled.tolist() == [10.0] * 3
