"""The fake GPU keeps the rules of CUDA that this project depends on, and reports one that is broken."""

from __future__ import annotations

import textwrap

import pytest

from tests.fake_gpu.commands import need_cuda_build, run
from tests.fake_gpu.environment import check_switches

need_cuda_build()
pytestmark = pytest.mark.fake_gpu

GRAPH = "graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device='cuda')\n"
CAPTURE = GRAPH + "with torch.cuda.graph(graph):\n    y = x + 1\n    "
BROKEN = {  # code -> a word of the error that it must raise
    "a capture waits": (CAPTURE + "y.sum().item()", "was called during a capture"),
    "a capture copies from unpinned memory": (CAPTURE + "torch.zeros(3).to('cuda', non_blocking=True)", "unpinned"),
    "a capture draws from a generator that it does not have": (
        "g = torch.Generator('cuda')\n" + CAPTURE + "torch.rand(3, device='cuda', generator=g)",
        "generator",
    ),
    "a captured stream waits for work outside the capture": (
        "s = torch.cuda.Stream()\ne = torch.cuda.Event()\ne.record(s)\n"
        + CAPTURE
        + "torch.cuda.current_stream().wait_event(e)",
        "uncaptured",
    ),
    "a stream joins a capture and does not return": (
        "s = torch.cuda.Stream()\n" + CAPTURE + "s.wait_stream(torch.cuda.current_stream())",
        "unjoined",
    ),
    "an operator mixes devices": ("torch.zeros(3, device='cuda:0') + torch.zeros(3, device='cuda:1')", "cuda:1"),
    "late work fails": (
        "x, i, v = torch.zeros(4, device='cuda'), torch.tensor([9]).cuda(), torch.ones(1, device='cuda')\n"
        "torch.cuda._sleep(1)\nx.index_put_((i,), v)\ntorch.cuda.synchronize()",
        "out of bounds",
    ),
    "a capture writes by a mask": (CAPTURE + "x[x > 0] = torch.ones(4, device='cuda')", "waits for the stream"),
    "a capture reads by an index of the host": (CAPTURE + "x[torch.tensor([1])]", "waits for the stream"),
    "the default stream joins a capture": (
        "s = torch.cuda.Stream()\nd = torch.cuda.default_stream()\n"
        + GRAPH
        + "with torch.cuda.graph(graph, stream=s):\n    y = x + 1\n    d.wait_stream(s)",
        "cannot join a capture",
    ),
    "the host asks for an event of a capture": (
        "e = torch.cuda.Event()\n" + CAPTURE + "e.record()\ne.query()",
        "recorded in a capture",
    ),
    "a copy to strided pinned memory where no wait is allowed": (
        "p, x = torch.zeros(4, 2).pin_memory(), torch.zeros(4, device='cuda')\n"
        "torch.cuda.set_sync_debug_mode('error')\np[:, 0].copy_(x, non_blocking=True)",
        "synchronizing",
    ),
    "more memory is used than there is": ("torch.empty(81 << 30, dtype=torch.uint8, device='cuda')", "out of memory"),
    "a wait where none is allowed": (
        "torch.cuda.set_sync_debug_mode('error')\ntorch.zeros(3, device='cuda').cpu()",
        "synchronizing",
    ),
}
HELD = {  # code that must not raise
    "fresh memory holds no number": "assert torch.empty(8, device='cuda').cpu().isnan().all()",
    "memory that is free during a capture holds no number": (
        GRAPH + "old = torch.zeros(4, device='cuda')\naddress = old.data_ptr()\ndel old\n"
        "with torch.cuda.graph(graph):\n    y = x + 1\n"
        "import ctypes\nassert ctypes.string_at(address, 4) == b'\\xff' * 4"
    ),
    "a replay draws new numbers, and the same ones from the same state": (
        GRAPH + "with torch.cuda.graph(graph):\n    y = torch.rand(4, device='cuda')\n"
        "def draw():\n    graph.replay()\n    return y.tolist()\n"
        "state = torch.cuda.get_rng_state()\na, b = draw(), draw()\n"
        "torch.cuda.set_rng_state(state)\nassert a != b and draw() == a and draw() == b"
    ),
    "a replay reads the present content of its inputs": CAPTURE
    + "pass\nx.fill_(5)\ngraph.replay()\nassert y.tolist() == [6.0] * 4",
    "a copy to pinned memory is late": (
        "p = torch.zeros(4, pin_memory=True)\ntorch.cuda._sleep(1)\n"
        "p.copy_(torch.ones(4, device='cuda'), non_blocking=True)\nassert p.sum() == 0\n"
        "torch.cuda.synchronize()\nassert p.sum() == 4"
    ),
    "a copy from pinned memory reads it late": (
        "p = torch.ones(4, pin_memory=True)\ntorch.cuda._sleep(1)\n"
        "x = p.to('cuda', non_blocking=True)\np.fill_(7)\nassert x.tolist() == [7.0] * 4"
    ),
    "a copy from unpinned memory reads it at once": (
        "p = torch.ones(4)\ntorch.cuda._sleep(1)\n"
        "x = p.to('cuda', non_blocking=True)\np.fill_(7)\nassert x.tolist() == [1.0] * 4"
    ),
    "a tensor is printed": "assert 'cuda:0' in str(torch.ones(2, device='cuda'))",
    "streams without an event have no order, and an event gives one": (
        "def order(waits):\n"
        "    x, s = torch.zeros(4, device='cuda'), torch.cuda.Stream()\n"
        "    torch.cuda.synchronize()\n"
        "    torch.cuda._sleep(1)\n"
        "    x.fill_(1)\n"
        "    if waits:\n        s.wait_stream(torch.cuda.current_stream())\n"
        "    with torch.cuda.stream(s):\n        y = x.clone()\n"
        "    s.synchronize()\n    return y.sum().item()\n"
        "assert order(True) == 4 and order(False) == 0"
    ),
}


def run_code(code: str) -> tuple[int, str]:
    return run("-c", "import torch\n" + textwrap.dedent(code), switches={"FAKE_GPU_STREAM_SEED": "1"})


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_an_error(name: str) -> None:
    code, output = run_code(BROKEN[name][0])
    assert code == 1 and BROKEN[name][1] in output, output


@pytest.mark.parametrize("name", HELD)
def test_the_fake_does_what_a_gpu_does(name: str) -> None:
    code, output = run_code(HELD[name])
    assert code == 0, output


def test_a_function_of_cuda_that_the_fake_does_not_have_reports_its_name() -> None:
    call = "import ctypes; ctypes.CDLL('libcudart.so.13').cudaMemPoolTrimTo()"
    code, output = run("-c", f"import torch\n{call}", switches={})
    assert "cudaMemPoolTrimTo was called" in output and "tests/fake_gpu/runtime" in output, (code, output)


@pytest.mark.parametrize(
    "switch", ["FAKE_GPU_BOGUS=1", "FAKE_GPU_COUNT=two", "FAKE_GPU_P2P=no", "FAKE_GPU_CAPABILITY=9"]
)
def test_a_switch_that_does_not_exist_or_has_a_wrong_value_is_refused(switch: str) -> None:
    name, _, value = switch.partition("=")
    with pytest.raises(ValueError, match=rf"^{name}.*; expected .*; correct or unset it$"):
        check_switches({name: value})
