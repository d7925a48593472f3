"""The check of the GPU: if torch cannot use it, the run ends at once, with the fix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shared.errors import SettingError
from shared.gpu import check_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the calls of torch that need a GPU: by default, one that works and has bfloat16."""
    state = SimpleNamespace(error=None, capability=(9, 0), emptied=0)

    def ones(*sizes: int, device: str) -> torch.Tensor:
        if state.error is not None:
            raise state.error
        return torch.zeros(*sizes)

    def empty_cache() -> None:
        state.emptied += 1

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    return state


def test_the_cpu_needs_no_check(gpu: SimpleNamespace) -> None:
    gpu.error = RuntimeError("must not be called")
    check_gpu("cpu", autocast="bfloat16")


def test_a_gpu_that_works_passes_and_its_memory_is_given_back(gpu: SimpleNamespace) -> None:
    check_gpu("cuda:0", autocast="bfloat16")
    assert gpu.emptied == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available\nCompile with ..."),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_version_and_fix(gpu: SimpleNamespace, error: Exception) -> None:
    gpu.error = error
    with pytest.raises(SettingError) as caught:
        check_gpu("cuda:0")
    message = str(caught.value)
    assert message.startswith(f"torch {torch.__version__}, built for ") and str(error).splitlines()[0] in message
    assert (
        "; expected a GPU that runs a kernel; check with 'nvidia-smi' that it has free memory" in message
        and "Compile with" not in message
    )


def test_bfloat16_on_a_gpu_that_only_emulates_it_is_refused(gpu: SimpleNamespace) -> None:
    gpu.capability = (7, 5)
    check_gpu("cuda:0", autocast="float16")
    with pytest.raises(SettingError, match=r"Old GPU, which has compute capability 7\.5; expected 8\.0 .*=float16 or"):
        check_gpu("cuda:0", autocast="bfloat16")
