"""Write the policy of a checkpoint as files that other programs run.

    policy.onnx          for onnxruntime, in any language
    policy.pt2           for torch.export.load
    policy.safetensors   the weights alone
    policy.json          names, order, shapes and units of inputs and outputs
    run_policy.py        runs policy.onnx; needs numpy and onnxruntime only

Before the files are kept, each format acts beside the live policy for 100 steps with resets.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collector_proc.simulators.base import ActionRange
from launcher.trained.policy import TrainedPolicy
from launcher.trained.recurrent import OUTPUTS, RecurrentPolicy, describe
from shared.errors import SettingError
from shared.files import write_json

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "safetensors")
INSTALL = "pip install -c constraints.txt -e '.[export]'"
ONNX_FILE, TORCH_FILE, WEIGHTS_FILE = "policy.onnx", "policy.pt2", "policy.safetensors"
RUNNER = Path(__file__).with_name("policy_runner.py")  # not imported here: onnxruntime may be missing
CHECK_STEPS, CHECK_ROWS = 100, 3
RESET_SHARE = 0.05  # of the rows of a step of the check
TOLERANCE = 1e-3  # of beliefs and of actions in [-1, 1]; rounding differences grow over the recurrent steps

# Inputs in the order of `RecurrentPolicy.input_names` -> action, next belief.
Runner = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def export_policy(trained: TrainedPolicy, actions: ActionRange | None, out: Path) -> dict[str, Any]:
    """Write every file of a policy on the CPU into the folder `out` and return the content of policy.json.

    actions: the simulator's range; with None, actions stay in [-1, 1].
    Raises: SettingError if a package is missing, or if a written file disagrees with the live policy; `out` is then as
    it was before.
    """
    check_packages()
    partial, aside = (out.with_name(f".{kind}-{out.name}") for kind in ("partial", "aside"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        facts = _write(trained, actions, partial)
        write_json(partial / "policy.json", facts)
        if out.exists():
            out.rename(aside)
        partial.rename(out)
        return facts
    finally:
        for folder in (partial, aside):
            shutil.rmtree(folder, ignore_errors=True)


def check_packages() -> None:
    """Raise SettingError if a package of the extra `export` is not installed."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SettingError(
                f"the package {name} cannot be imported: {error}; expected the extra 'export', because the files are "
                f"written and checked with it; run: {INSTALL}"
            ) from error


def largest_difference(trained: TrainedPolicy, module: RecurrentPolicy, run: Runner) -> float:
    """Return how far a runner is from the live policy in 100 steps: in beliefs, and in actions brought to [-1, 1].

    Both get the same random observations, noise and resets.
    """
    generator = torch.Generator().manual_seed(0)
    belief = torch.full((CHECK_ROWS, sum(module.parts.values())), torch.nan)  # a reset must not depend on it
    largest = 0.0
    for step in range(CHECK_STEPS):
        obs = random_obs(trained, CHECK_ROWS, generator)
        reset = torch.rand(CHECK_ROWS, generator=generator) < (1.0 if step == 0 else RESET_SHARE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)  # the live policy draws the noise of its belief first
            expected = trained.act(obs, reset)
            torch.manual_seed(step)
            noise = torch.randn(CHECK_ROWS, module.parts["stoch"])
        action, belief = run([*(obs[name] for name in module.entries), belief, reset, noise])
        assert trained.belief is not None
        ours = torch.cat([belief, (action - module.offset) / module.factor.clamp_min(1e-12)], -1)
        theirs = torch.cat([*trained.belief, expected, expected], -1)
        largest = max(largest, float((ours - theirs).abs().nan_to_num(torch.inf).max()))
    return largest


def random_obs(trained: TrainedPolicy, num_rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return observations (N, *shape): random bytes, and vectors in the range that the normaliser has seen."""
    found = {}
    for name, entry in sorted(trained.spec.obs.items()):
        if entry.is_image:
            found[name] = torch.randint(0, 256, (num_rows, *entry.shape), generator=generator, dtype=torch.uint8)
            continue
        found[name] = torch.randn(num_rows, *entry.shape, generator=generator)
        norms = trained.policy.normaliser.entries
        if name in norms:
            statistics = norms[name].state_dict()
            found[name] = found[name] * statistics["var"].sqrt() + statistics["mean"]
    return found


def _write(trained: TrainedPolicy, actions: ActionRange | None, folder: Path) -> dict[str, Any]:
    """Write and check the files in an empty folder, and return what policy.json holds."""
    module = RecurrentPolicy(trained, actions).eval()
    facts = describe(module, trained, actions)
    differences: dict[str, float] = {}

    def check(name: str, run: Runner) -> None:
        difference = differences[name] = largest_difference(trained, module, run)
        if not difference <= TOLERANCE:
            raise SettingError(
                f"{name} differs by {difference:.3g} from the live policy within {CHECK_STEPS} steps; expected at most "
                f"{TOLERANCE:g}; nothing was written, please report this with the versions that `probe` prints"
            )

    safetensors = importlib.import_module("safetensors.torch")
    weights = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
    safetensors.save_file(weights, folder / WEIGHTS_FILE, metadata={"policy": json.dumps(facts)})
    check(WEIGHTS_FILE, _weights_runner(safetensors.load_file(folder / WEIGHTS_FILE), trained, actions))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        program = _program(trained, module)
        torch.export.save(program, folder / TORCH_FILE)
        check(TORCH_FILE, _module_runner(torch.export.load(folder / TORCH_FILE).module()))
        torch.onnx.export(
            program,
            (),
            folder / ONNX_FILE,
            input_names=module.input_names,
            output_names=list(OUTPUTS),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    check(ONNX_FILE, _onnx_runner(folder, module))
    shutil.copy(RUNNER, folder / "run_policy.py")
    return facts | {"largest_difference": differences}


def _program(trained: TrainedPolicy, module: RecurrentPolicy) -> torch.export.ExportedProgram:
    """Return the function as a graph in which the size of the batch is open."""
    obs = random_obs(trained, 2, torch.Generator().manual_seed(0))
    belief, reset = torch.zeros(2, sum(module.parts.values())), torch.ones(2, dtype=torch.bool)
    example = (*(obs[name] for name in module.entries), belief, reset, torch.zeros(2, module.parts["stoch"]))
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    return torch.export.export(module, example, dynamic_shapes=(tuple({0: batch} for _ in example),))


def _onnx_runner(folder: Path, module: RecurrentPolicy) -> Runner:
    session = importlib.import_module("onnxruntime").InferenceSession(
        folder / ONNX_FILE, providers=["CPUExecutionProvider"]
    )

    def run(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        named = {name: tensor.numpy() for name, tensor in zip(module.input_names, inputs, strict=True)}
        action, belief = session.run(list(OUTPUTS), named)
        return torch.from_numpy(action), torch.from_numpy(belief)

    return run


def _module_runner(module: torch.nn.Module) -> Runner:
    @torch.no_grad()
    def run(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return module(*inputs)

    return run


def _weights_runner(weights: dict[str, Tensor], trained: TrainedPolicy, actions: ActionRange | None) -> Runner:
    """Return a runner of a fresh policy that gets its weights from the file."""
    fresh = RecurrentPolicy(trained.blank(), actions)
    fresh.load_state_dict(weights)
    return _module_runner(fresh)
