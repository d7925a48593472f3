"""Entry of the collector: `python -m collector_proc --run-dir DIR`.

The order of imports matters in this file: a simulator such as Isaac Lab must start before torch is imported. So neither
this module nor anything that it imports at its top may import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.rounds import RoundBegins, seed_of
from collector_proc.simulators import ending
from collector_proc.simulators.registry import BACKENDS, build_simulator
from shared.errors import HandoverError, SettingError, SimulatorError, TransportError
from shared.geometry import Geometry
from shared.gpu import check_gpu, describe_gpu
from shared.handover import Disconnected, connect
from shared.lifetime import ExitCode, StopRequested, die_first_when_memory_ends
from shared.output import write_error
from shared.process import Process, start_process
from shared.socket_folder import read_secret

if TYPE_CHECKING:
    from collector_proc.collect import Collector
    from collector_proc.connect import Connection
    from collector_proc.simulators.base import Simulator


def main() -> int:
    """Run one collector and return its exit code.

    code  meaning
    0     the collector was asked to stop, or the learner has ended
    2     the first collector failed before its first chunk, by an error that is not the learner's; or a running
          simulator shows that a setting is wrong
    75    the collector exceeded collector.max_rss_gb
    76    the collector reached collector.recycle_after_hours
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
    attempt, code = Attempt(arguments.incarnation), ExitCode.FAILED
    try:
        while (ended := _collect_round(process, attempt, device=arguments.device)) is None:
            process.log.info("another round begins", number=attempt.round_number)
        code = ended
    except StopRequested:
        process.log.info("asked to stop before the first tick")
        code = ExitCode.FINISHED
    except Disconnected:
        process.log.info("the learner has ended")
        code = ExitCode.FINISHED
    except (Exception, SystemExit) as error:  # a simulator and its task may raise anything, or call exit
        code = attempt.failed(process, error)
    finally:
        process.progress.phase("stopping")
        if attempt.simulator is not None:
            with ending.closing_deadline(process.settings.deadlines.stop_s / 2, code):
                attempt.simulator.close()
    return code


@dataclass
class Attempt:
    """What one collector has achieved, which decides what its failure means."""

    incarnation: int
    simulator: Simulator | None = None
    collector: Collector | None = None
    round_number: int = 0  # of lockstep; 0 in async mode

    def failed(self, process: Process, error: BaseException) -> ExitCode:
        """Report an error that ends this collector, and return its exit code."""
        text = str(error)
        if not isinstance(error, (SettingError, SimulatorError, TransportError)):
            text = describe_error(error)
            traceback.print_exception(error)  # into logs/collector.out
        process.log.error("failed", error=text)
        process.progress.refuse(text)
        has_committed = self.collector is not None and self.collector.num_chunks > 0
        return exit_code(
            error,
            simulator_started=self.simulator is not None,
            is_first_chunk=self.incarnation == 0 and not has_committed,
        )

    def check_round(self, process: Process, connection: Connection) -> None:
        """Disconnect if another round of lockstep is due than that of this collector. Raises: RoundBegins."""
        due = connection.welcome.round_number
        if process.settings.collector.mode == "lockstep" and due != self.round_number:
            connection.channel.close()
            raise RoundBegins(due)


def describe_error(error: BaseException) -> str:
    """Return the kind and the text of an error that is none of ours, and the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({place[0].filename}:{place[0].lineno}, in {place[0].name})" if place else ""
    return f"{type(error).__name__}: {error}{where}"


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


def _collect_round(process: Process, attempt: Attempt, *, device: str) -> ExitCode | None:
    """Collect until the end, and return the exit code; or until another round of lockstep begins, and return None."""
    seed = seed_of(process, incarnation=attempt.incarnation, round_number=attempt.round_number)
    if attempt.simulator is None:
        process.progress.phase("simulator")
        attempt.simulator = start_simulator(process, seed=seed, device=device)
    try:
        return _collect(process, attempt, device=device, seed=seed)
    except RoundBegins as begins:
        attempt.round_number = begins.number
    if not BACKENDS[process.settings.env.backend].starts_once:
        simulator, attempt.simulator = attempt.simulator, None
        simulator.close()
    return None


def _collect(process: Process, attempt: Attempt, *, device: str, seed: int) -> ExitCode:
    """Connect to the learner and stream chunks until the end. This imports torch. Raises: RoundBegins."""
    settings, run, simulator, incarnation = process.settings, process.run, attempt.simulator, attempt.incarnation
    assert simulator is not None
    process.progress.phase("hello")
    # The learner waits only a short time for the hello of a connection, so connecting comes after the slow imports.
    import torch

    from collector_proc.collect import Collector
    from collector_proc.connect import open_replay

    # The policy acts on the simulator's GPU, under the name that the simulator gives it, or on the requested device.
    acting_device = torch.device(simulator.device if simulator.device.startswith("cuda") else device)
    check_gpu(str(acting_device))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    channel = connect(run.socket_dir, deadline_s=settings.deadlines.start_s, alive=process.alive)
    connection = open_replay(
        channel, simulator.spec, settings.deadlines,
        run_id=run.run_id, secret=read_secret(run.socket_dir), incarnation=incarnation, device=acting_device,
        alive=process.alive,
    )  # fmt: skip
    attempt.check_round(process, connection)
    ticks = Geometry.of(settings).ticks_per_chunk
    collector = attempt.collector = Collector(
        process, simulator, connection, ticks=ticks, incarnation=incarnation,
        seed=seed + 7919,  # so that the policy and the simulator draw different numbers
        device=acting_device,
    )  # fmt: skip
    process.log.info(
        "collecting", incarnation=incarnation, acts_on=describe_gpu(str(acting_device)), spec=simulator.spec.to_dict()
    )
    collector.run()
    process.log.info(
        "ended", agent_steps=collector.agent_steps, asked_to_stop=process.stop.requested,
        exceeded_memory_limit=collector.exceeded_memory_limit, is_recycled=collector.is_recycled,
    )  # fmt: skip
    if collector.exceeded_memory_limit:
        return ExitCode.OUTGROWN
    return ExitCode.RECYCLED if collector.is_recycled else ExitCode.FINISHED


def exit_code(error: BaseException, *, simulator_started: bool, is_first_chunk: bool) -> ExitCode:
    """Return REFUSED if another start would fail in the same way, else FAILED.

    is_first_chunk: no collector of this launch has committed a chunk, so nothing shows that the task can work at all.
    """
    if isinstance(error, TransportError) and not isinstance(error, HandoverError):
        return ExitCode.FAILED  # the learner may have failed
    # If a later collector cannot start, memory or a port is lacking, or a file is being edited.
    is_wrong_setting = simulator_started and isinstance(error, SettingError)
    return ExitCode.REFUSED if is_first_chunk or is_wrong_setting else ExitCode.FAILED


if __name__ == "__main__":
    ending.run(main)
