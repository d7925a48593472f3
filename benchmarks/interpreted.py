"""Do the Triton kernels of the compiled gradient step compute what eager code computes? Runs without a GPU.

    python -m tests.fake_gpu python -m benchmarks.interpreted

The compiler generates the code for a GPU, of networks that are small enough for Triton's interpreter. The interpreter
runs every kernel in Python, the CPU computes the matrix products, and the memory is that of the fake GPU, which copies
real bytes. Results and gradients of each compiled function are compared with those of the function itself.

It cannot show errors of the translation to machine code: `benchmarks.triton_kernels` only shows that there are none
that stop it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.runtime import triton_helpers
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.utils import fresh_cache
from torch.utils import _pytree as pytree

from learner_proc.cells import Carried, ImagineScan, ObserveScan
from learner_proc.compiling import compiler
from learner_proc.gradient_step import GradientStep
from learner_proc.imagination import entropy_and_std
from learner_proc.optimiser import limit
from learner_proc.products import Weights
from learner_proc.scan import Scan
from learner_proc.slopes import _block_gradients, _evaluate_block
from shared.config import CompileSettings, NetworkSettings, OptimizationSettings, Settings
from shared.model.rssm import Belief, Posterior
from shared.stream import ObsSpec, StreamSpec

GPU = torch.device("cuda")
B, L, N, T, A, S, D, OBS = 2, 3, 6, 2, 2, 3, 8, 4
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2}  # of the largest absolute value of a tensor


class Case(NamedTuple):
    """A function that is compiled, and what it takes: the first `num_constant` arguments get no gradient."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_constant: int = 0


def host(x: Tensor) -> Tensor:
    """Return a copy in host memory with the same strides. Other copies would use a kernel for tensors with gaps."""
    if not x.is_cuda:
        return x.detach()
    x = x.detach()
    storage = x.untyped_storage().cpu()
    return x.new_empty(0, device="cpu").set_(storage, x.storage_offset(), x.size(), x.stride())


def interpret_everything() -> None:
    """Replace what the interpreter does not have: products on the device, and functions of CUDA's library."""
    inductor.joint_graph_constant_folding = False  # it computes constants on the device
    importlib.import_module("torch._inductor.kernel.mm")  # it sets the products that are replaced below
    tl: Any = importlib.import_module("triton.language")  # the CPU build of torch has no Triton

    def put(out: Tensor, value: Tensor) -> Tensor:
        filled = host(out)
        filled.copy_(value)
        out.untyped_storage().copy_(filled.untyped_storage())
        return out

    extern: Any = extern_kernels
    extern.mm = lambda a, b, out: put(out, host(a) @ host(b))
    extern.addmm = lambda bias, a, b, *, out, **factors: put(out, torch.addmm(host(bias), host(a), host(b), **factors))
    helpers: Any = triton_helpers
    helpers.libdevice = SimpleNamespace(
        exp=lambda x: tl.exp(x),
        log=lambda x: tl.log(x),
        sqrt=lambda x: tl.sqrt(x),
        rsqrt=lambda x: 1.0 / tl.sqrt(x),
        expm1=lambda x: tl.exp(x) - 1.0,
        log1p=lambda x: tl.log(1.0 + x),
        tanh=lambda x: 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0,
        isnan=lambda x: x != x,
    )


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Return the compiled functions of a gradient step with small networks, with products in `dtype`."""
    torch.manual_seed(0)
    networks = NetworkSettings(state_dim=S, rssm_hidden_dim=D, hidden_dim=8, init_std=1.0, continue_head=True)
    settings = Settings(networks=networks, optimization=OptimizationSettings(autocast="false", free_nats=0.0))
    settings.optimization.compile.enabled = False
    step = GradientStep(StreamSpec(1, {"policy": ObsSpec((OBS,), "float32")}, A), settings, device=torch.device("cpu"))

    def same(function: Callable) -> Callable:
        return function

    observe = ObserveScan(step.policy.rssm, dtype=dtype, compiled=same)._scan
    imagine = ImagineScan(step._imagination, dtype=dtype, compiled=same)._scan
    first = torch.zeros(N, 1, dtype=torch.bool)
    first[1] = True
    found = {
        "observe": _scan_case(observe, dtype, (first, torch.randn(N, S))),
        "imagine": _scan_case(imagine, dtype, (torch.randn(N, A), torch.randn(N, S))),
        "head": Case(_evaluate_block, (step.critic.layers, torch.randn(N, S + D), dtype, True), 4),
    }
    block = _evaluate_block(step.critic.layers, torch.randn(N, S + D), dtype, True)
    found["gradients of a head"] = Case(_block_gradients, (pytree.tree_map(Tensor.detach, block), torch.randn(N)), 2)
    if dtype == torch.bfloat16:
        return found
    obs = {"policy": torch.randn(B, L, OBS)}
    stats = [torch.rand(B, L, size) + 0.1 for size in (D, S, S, S)]
    posterior = Posterior(Belief(*stats[:2]), *stats[2:])
    terminal = torch.zeros(B, L, dtype=torch.bool)
    rows = [torch.randn(N, 4) for _ in range(4)]
    return found | {
        "embedding": Case(_method("embed"), (step.world_model, obs)),
        "loss of the model": Case(_method("loss"), (step.world_model, obs, posterior, torch.randn(B, L), terminal)),
        "loss of the actor": Case(step._behavior.actor_loss, (*rows[:2], terminal.flatten(), *rows[2:])),
        "loss of the critic": Case(step._behavior.critic_loss, (rows[0], rows[1].clone(), torch.rand(N, 4))),
        "entropy": Case(entropy_and_std, (torch.randn(N, A), torch.rand(N, A) + 0.1, torch.randn(N, A))),
        "clipping": Case(limit, (torch.tensor(250.0), 100.0)),
    }


def _method(name: str) -> Callable[..., Any]:
    return lambda module, *arguments: getattr(module, name)(*arguments)


def _scan_case(scan: Scan, dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> Case:
    """Return the function that a scan compiles, for T steps of N rows."""
    layers, params = scan._layers, [param.detach().to(dtype) for param in scan._params]
    widths = [layer.in_features - scan._num_known.get(layer, 0) for layer in layers]
    weights = tuple(w[:, :width].contiguous() for w, width in zip(params, widths, strict=False))
    by_layer = dict(zip(layers, params, strict=False))
    joint = tuple(torch.cat([by_layer[layer] for layer in of]) for of in scan._joint)
    addends = tuple(
        tuple(torch.randn(N, layer.out_features).to(dtype) for _ in range(T)) if learned else ()
        for layer, learned in zip(layers, scan._learned, strict=True)
    )
    carried = Carried(torch.randn(N, D), torch.randn(N, S), tuple(torch.randn(N, D).to(dtype) for _ in range(3)))
    frozen = Weights(weights, tuple(params[len(layers) :]), joint)
    several = tuple(tuple(x.clone() for _ in range(T)) for x in inputs)

    def steps(frozen: Weights, addends: Any, carried: Any, several: Any) -> Any:
        found, _, kept = scan._steps(frozen, addends, carried, several)
        return found, kept

    return Case(steps, (frozen, addends, carried, several), 1)


def difference(case: Case) -> tuple[float, float]:
    """Return the largest relative differences of results and of gradients between compiled and eager code."""
    compiled = compiler(CompileSettings(), GPU)(case.function)
    expected, found = _run(case.function, case, torch.device("cpu")), _run(compiled, case, GPU)
    return _largest(found[0], expected[0]), _largest(found[1], expected[1])


def _run(function: Callable[..., Any], case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients in host memory. Every tensor of floats gets a gradient, but the constant ones."""
    moved = pytree.tree_map(partial(_moved, device=device), case.arguments)
    learned = [x for x in _tensors(moved[case.num_constant :]) if x.is_floating_point()]
    for x in learned:
        x.requires_grad_()
    results = [x for x in pytree.tree_leaves(function(*moved)) if isinstance(x, Tensor)]
    differentiable = [x for x in results if x.requires_grad]
    torch.manual_seed(1)
    upstream = [torch.randn(x.shape).to(x.dtype).to(device) for x in differentiable]
    grads = torch.autograd.grad(differentiable, learned, upstream, allow_unused=True) if learned else ()
    return [host(x) for x in results], [host(grad) for grad in grads if grad is not None]


def _moved(x: Any, *, device: torch.device) -> Any:
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(device)  # the other run keeps the original
    return x.detach().clone().to(device) if isinstance(x, Tensor) else x


def _tensors(arguments: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(arguments)
    own = [x for x in leaves if isinstance(x, Tensor)]
    return own + [p for x in leaves if isinstance(x, nn.Module) for p in x.parameters()]


def _largest(found: list[Tensor], expected: list[Tensor]) -> float:
    differences = [
        (mine.float() - other.float()).abs().max().item() / max(other.float().abs().max().item(), 1.0)
        for mine, other in zip(found, expected, strict=True)
        if mine.numel()
    ]
    return max(differences, default=0.0)


def main() -> int:
    """Compare all functions; return 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported, so start again
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.interpreted"])
    interpret_everything()
    failed = 0
    with fresh_cache(), torch.autograd.set_multithreading_enabled(False):
        for dtype, tolerance in TOLERANCES.items():
            for name, case in cases(dtype).items():
                results, grads = difference(case)
                agrees = max(results, grads) <= tolerance
                failed += not agrees
                word = "agrees" if agrees else "DIFFERS"
                print(f"{name}, {dtype}: {word}; results {results:.1e}, gradients {grads:.1e}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
