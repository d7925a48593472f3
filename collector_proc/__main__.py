"""Entry of the collector: `python -m collector_proc --run-dir DIR`.

The order of imports matters in this file: a simulator such as Isaac Lab must start before torch is imported. So neither
this module nor anything that it imports at its top may import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator
from shared.errors import HandoverError, SettingError, SimulatorError, TransportError
from shared.geometry import Geometry
from shared.gpu import check_gpu, describe_gpu
from shared.handover import Disconnected, connect
from shared.lifetime import ExitCode, StopRequested, die_first_when_memory_ends
from shared.output import write_error
from shared.process import Process, start_process
from shared.socket_folder import read_secret

if TYPE_CHECKING:
    from collector_proc.simulators.base import Simulator


def main() -> int:
    """Run one collector and return its exit code.

    code  meaning
    0     the collector was asked to stop, or the learner has ended
    2     at the first start of the run, the simulator failed or the replay cannot be shared; or a running simulator
          shows that a setting is wrong
    75    the collector exceeded collector.max_rss_gb
    1     anything else
    """
    arguments = _parse_arguments()
    assert "torch" not in sys.modules, "torch was imported before the simulator started"
    try:
        process = start_process(arguments.run_dir, "collector")
    except SettingError as error:
        write_error(f"error: {error}\n")
        return ExitCode.REFUSED
    return run_collector(process, arguments)


def run_collector(process: Process, arguments: argparse.Namespace) -> int:
    """Start the simulator, collect until the end, close the simulator, and return the exit code of `main`."""
    die_first_when_memory_ends()  # so that the learner survives, which owns the networks and the replay
    seed = process.settings.env.seed + 1000 * arguments.incarnation + 1_000_000 * process.run.num_resumes
    simulator, code = None, ExitCode.FAILED
    try:
        process.progress.phase("simulator")
        simulator = start_simulator(process, seed=seed, device=arguments.device)
        code = _collect(process, simulator, device=arguments.device, incarnation=arguments.incarnation, seed=seed)
    except StopRequested:
        process.log.info("asked to stop before the first tick")
        code = ExitCode.FINISHED
    except Disconnected:
        process.log.info("the learner has ended")
        code = ExitCode.FINISHED
    except (SettingError, SimulatorError, TransportError) as error:
        process.log.error("failed", error=str(error))
        code = exit_code(error, simulator_started=simulator is not None, incarnation=arguments.incarnation)
        if code == ExitCode.REFUSED:
            process.progress.refuse(str(error))
    finally:
        process.progress.phase("stopping")
        if simulator is not None:
            with ending.closing_deadline(process.settings.deadlines.stop_s / 2, code):
                simulator.close()
    return code


def start_simulator(process: Process, *, seed: int, device: str) -> Simulator:
    """Return the simulator that the settings choose. Its start can take minutes, so a request to stop interrupts it.

    Raises: StopRequested if asked to stop; SettingError or SimulatorError as `build_simulator`.
    """
    try:
        with process.stop.interrupting():
            simulator = build_simulator(process.settings, seed=seed, device=device, crash_dir=process.run_dir / "crash")
    except Exception:
        process.stop.check()  # a backend may have turned the interruption into an error of its own
        raise
    process.stop.install()  # again, because a simulator may have replaced the handlers
    return simulator


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m collector_proc", description="Run one collector of a run. launch.py starts it."
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder made by launch.py")
    parser.add_argument("--device", default="cpu", help="device of the simulator and the acting policy")
    parser.add_argument("--incarnation", type=int, default=0, help="how many collectors of this run came before")
    return parser.parse_args()


def _collect(process: Process, simulator: Simulator, *, device: str, incarnation: int, seed: int) -> ExitCode:
    """Connect to the learner and stream chunks until the end. This imports torch."""
    settings, run = process.settings, process.run
    process.progress.phase("hello")
    channel = connect(run.socket_dir, deadline_s=settings.deadlines.start_s, alive=process.alive)

    import torch

    from collector_proc.collect import Collector
    from collector_proc.connect import open_replay

    # The policy acts on the simulator's GPU, under the name that the simulator gives it, or on the requested device.
    acting_device = torch.device(simulator.device if simulator.device.startswith("cuda") else device)
    check_gpu(str(acting_device))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    connection = open_replay(
        channel, simulator.spec, settings.deadlines,
        run_id=run.run_id, secret=read_secret(run.socket_dir), incarnation=incarnation, device=acting_device,
        alive=process.alive,
    )  # fmt: skip
    ticks = Geometry.of(settings).ticks_per_chunk
    collector = Collector(
        process, simulator, connection, ticks=ticks, incarnation=incarnation,
        seed=seed + 7919,  # so that the policy and the simulator draw different numbers
        device=acting_device,
    )  # fmt: skip
    process.log.info(
        "collecting", incarnation=incarnation, acts_on=describe_gpu(str(acting_device)), spec=simulator.spec.to_dict()
    )
    collector.run()
    process.log.info(
        "ended",
        agent_steps=collector.agent_steps,
        asked_to_stop=process.stop.requested,
        exceeded_memory_limit=collector.exceeded_memory_limit,
    )
    return ExitCode.OUTGROWN if collector.exceeded_memory_limit else ExitCode.FINISHED


def exit_code(error: Exception, *, simulator_started: bool, incarnation: int) -> ExitCode:
    """Return REFUSED if another start would fail in the same way, else FAILED."""
    if simulator_started:
        is_final = isinstance(error, SettingError) or (incarnation == 0 and isinstance(error, HandoverError))
        return ExitCode.REFUSED if is_final else ExitCode.FAILED
    # An earlier collector has started the simulator; now memory or a port is lacking, or a file is being edited.
    return ExitCode.FAILED if incarnation > 0 else ExitCode.REFUSED


if __name__ == "__main__":
    ending.run(main)
