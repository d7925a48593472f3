"""`python launch.py export RUN`: write the policy as ONNX, torch.export and safetensors files. Torch-free at import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.parser import command_parser, path_argument
from launcher.trained_run import check_stream, open_trained_run, running_simulator
from shared.errors import SettingError, SimulatorError
from shared.output import output_aside, write_output

if TYPE_CHECKING:
    from collector_proc.simulators.base import ActionRange, Simulator
    from launcher.trained_run import TrainedRun

DESCRIPTION = """\
Write the policy of a run as files for other programs: ONNX, torch.export (.pt2) and safetensors, with a JSON of names,
order, shapes and units, and a short Python program that needs numpy and onnxruntime only. One call is one agent step:
observations and belief in, action and next belief out. Observations are normalised, images scaled and actions brought
to the simulator's range inside. Every file acts beside the live policy for 100 steps before it is kept.

The simulator is started once, on the CPU, to read the range of its actions; --unit-actions leaves them in [-1, 1].
"""


def main(arguments: list[str]) -> int:
    """Export one checkpoint and return 0.

    Raises: SettingError if the run or a package is missing, or if the simulator does not start.
    """
    parser = command_parser("export", DESCRIPTION, "runs/NAME --out policy")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="folder of a run")
    parser.add_argument("--checkpoint", metavar="STEP", default="latest", help="STEP, best or latest (default: latest)")
    parser.add_argument("--out", metavar="DIR", type=path_argument, help="folder of the files (default: RUN/export)")
    parser.add_argument("--unit-actions", action="store_true", help="leave actions in [-1, 1]; starts no simulator")
    parser.add_argument("--device", default="cpu", help="where the simulator starts: cpu (default) or cuda:0")
    options = parser.parse_args(arguments)
    if options.checkpoint == "all":
        raise SettingError("--checkpoint all names several; expected one; write a step, best or latest")
    run = open_trained_run(options.run, options.checkpoint)
    out: Path = (options.out or run.folder.path / "export").expanduser().resolve()
    with ExitStack() as stack:
        if options.unit_actions:
            stack.enter_context(output_aside())  # exporters print too
            facts = _export(run, None, out)
        else:
            facts = _export(run, stack.enter_context(_simulator(run, options.device)), out)
    for name, difference in facts["largest_difference"].items():
        write_output(f"{out / name}  (differs from the live policy by at most {difference:.1e})\n")
    write_output(f"{out / 'policy.json'}\n{out / 'run_policy.py'}\n")
    return 0


def _export(run: TrainedRun, simulator: Simulator | None, out: Path) -> dict[str, Any]:
    """Write the files of the first chosen checkpoint and return the content of policy.json. This imports torch."""
    from launcher.trained.exporting import check_packages, export_policy
    from launcher.trained.policy import read_policy

    check_packages()
    trained = read_policy(run.checkpoints[0], run.settings)
    if simulator is None:
        return export_policy(trained, None, out)
    check_stream(simulator, trained.spec)
    return export_policy(trained, _action_range(simulator), out)


@contextmanager
def _simulator(run: TrainedRun, device: str) -> Iterator[Simulator]:
    """Run the simulator with as few environments as possible. Raises: SettingError if it does not start."""
    run.use_environments(1)
    try:
        with running_simulator(run.settings, seed=run.settings.env.seed, device=device) as simulator:
            yield simulator
    except SimulatorError as error:
        raise SettingError(
            f"{error}. Add --unit-actions to export without a simulator, with actions in [-1, 1]"
        ) from error


def _action_range(simulator: Simulator) -> ActionRange:
    """Return the range of a simulator's actions. Raises: SettingError if it does not report one."""
    actions: ActionRange | None = getattr(simulator, "action_range", None)
    if actions is None:
        raise SettingError(
            f"{type(simulator).__name__} does not report the range of its actions; expected an attribute "
            "`action_range`; add --unit-actions to leave actions in [-1, 1], and scale them yourself"
        )
    return actions
