"""Each of these faults, planted in a copy of the project, must fail a test that passes without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fake_gpu.commands import ROOT, need_cuda_build, run

need_cuda_build()
pytestmark = pytest.mark.fake_gpu


class Fault(NamedTuple):
    """A fault: the text to replace in a file, and the test that must notice it."""

    file: str
    old: str
    new: str
    test: str


COPIES = "tests/collector_proc/test_copies.py"
CAPTURED = "tests/learner_proc/test_captured_step.py"
RUNS = "tests/fake_gpu/test_runs.py::test_a_run_finishes_and_each_process_uses_its_own_gpu[0-1]"
DRAW = "replay.draw(num_sequences, length) if self._batch is None else self._batch"
CAPTURED_UPDATE = f"            return step({DRAW})\n"
READS = f"            numbers = step({DRAW})\n            numbers.values.sum().item()\n            return numbers\n"
ALLOCATES = (
    "            ctypes = __import__('ctypes')\n"
    "            ctypes.CDLL('libcudart.so.13').cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(64))\n"
)
SYNCHRONISES = f"{CAPTURED}::test_launching_a_captured_update_does_not_synchronise"
FAULTS = {
    "the step reads a number from the device": Fault(
        "learner_proc/captured_step.py",
        CAPTURED_UPDATE,
        READS,
        SYNCHRONISES,
    ),
    "a copy does not wait for the rows to be computed": Fault(
        "collector_proc/copies.py",
        "        self._stream.wait_stream(torch.cuda.current_stream(self._device))\n",
        "",
        COPIES,
    ),
    "a buffer is filled again while it is copied": Fault(
        "collector_proc/copies.py", "        self._copies[self._index].block_stream()\n", "", COPIES
    ),
    "a grant is sent before the queued steps have read its rows": Fault(
        "learner_proc/streaming.py",
        "            event.record()\n",
        "            event = None\n",
        "tests/learner_proc/test_streaming.py",
    ),
    "memory is allocated in the capture, and not through torch": Fault(
        "learner_proc/captured_step.py",
        CAPTURED_UPDATE,
        ALLOCATES + CAPTURED_UPDATE,
        SYNCHRONISES,
    ),
    "the two GPUs are swapped": Fault(
        "launcher/devices.py",
        "    uuids = [devices.train.uuid]\n",
        "    uuids = [devices.sim.uuid]\n",
        RUNS,
    ),
    "the slab is freed before the collector has mapped it": Fault(
        "learner_proc/handshake.py",
        "export_cuda_slab(replay.slab)\n",
        "export_cuda_slab(replay.slab)\n            replay.free()\n",
        RUNS,
    ),
    "a generator is not registered with the graph": Fault(
        "learner_proc/captured_step.py",
        "generators = [replay.generator] if self._batch is None else []",
        "generators = []",
        SYNCHRONISES,
    ),
    "an unpinned copy is captured": Fault(
        "learner_proc/captured_step.py",
        CAPTURED_UPDATE,
        "            torch.zeros(3).to(replay.device, non_blocking=True)\n" + CAPTURED_UPDATE,
        SYNCHRONISES,
    ),
    "new weights replace the tensors that the graph reads": Fault(
        "collector_proc/weights_receiver.py",
        "        torch._foreach_copy_(self._targets, self._views)",
        "        for target, view in zip(self._targets, self._views, strict=True):\n"
        "            target.data = view.clone()\n"
        "        _ = (self._targets, self._views)",
        "tests/collector_proc/test_weights_receiver.py",
    ),
    "a commit is sent before the copy has arrived": Fault(
        "collector_proc/copies.py", "return all(event.query() for event in self._events)", "return True", COPIES
    ),
    "the weights are packed while the last version is still copied": Fault(
        "learner_proc/publisher.py",
        "            torch.cuda.current_stream().wait_event(self._read)",
        "            pass",
        "tests/learner_proc/test_publisher.py",
    ),
    "a pinned buffer of samples is used again too early": Fault(
        "learner_proc/replay.py",
        "            copied.synchronize()\n",
        "            pass\n",
        f"{CAPTURED} -k bfloat16-False-True",
    ),
}
COPIED = ("collector_proc", "configs", "launcher", "learner_proc", "shared", "tests", "launch.py", "pyproject.toml")


def copy_project(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def plant(fault: Fault, folder: Path) -> None:
    """Put the fault into the copy of the project in this folder."""
    file = folder / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} must hold this text once: {fault.old}"
    import_torch = "" if "import torch\n" in text else "import torch\n"
    head, line, rest = text.replace(fault.old, fault.new).partition("from __future__ import annotations\n")
    file.write_text(head + line + import_torch + rest)


def run_test(test: str, folder: Path) -> tuple[int, str]:
    """Run a test in the copy of the project; return the exit code and the output."""
    marker = "fake_gpu" if "fake_gpu" in test else "gpu"
    seeds = [] if marker == "fake_gpu" else ["-p", "tests.fake_gpu.seeds", "--seeds", "5"]
    command = ["-m", "pytest", "-q", "-n0", "-x", "-m", marker, *seeds, *test.split()]
    return run(*command, switches={"FAKE_GPU_STREAM_SEED": "0"}, root=folder)


@pytest.mark.parametrize("test", sorted({fault.test for fault in FAULTS.values()}))
def test_without_a_fault_the_test_passes(test: str, tmp_path: Path) -> None:
    copy_project(tmp_path)
    code, output = run_test(test, tmp_path)
    assert code == 0 and " passed" in output and " skipped" not in output.splitlines()[-1], output


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_its_test(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    copy_project(tmp_path)
    plant(fault, tmp_path)
    code, output = run_test(fault.test, tmp_path)
    assert code == 1, f"the fault was not noticed:\n{output}"
    assert " error" not in output.splitlines()[-1], output
