"""Entry of the collector: `python -m collector_proc --run-dir DIR`. The one file where import order is law.

A simulator such as IsaacLab must start before torch is imported, so nothing here or above the call of
`build_simulator` may import it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator
from shared.compose import load_settings
from shared.config import geometry, num_envs
from shared.errors import SettingError, SimulatorError, TransportError
from shared.handover import Disconnected, connect
from shared.lifetime import ExitCode, die_first_when_memory_ends, die_with_parent, enable_stack_dumps, install_stop_flag
from shared.logs import configure
from shared.progress import Progress
from shared.run_folder import read_run


def main() -> int:
    """Exit codes: 0 asked to stop or the learner is gone, 75 more memory than collector.max_rss_gb, 2 a simulator that
    the run's first collector cannot start, or a setting that shows as wrong once one runs, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m collector_proc", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder made by launch.py")
    parser.add_argument("--device", default="cpu", help="device of the simulator and the acting policy")
    parser.add_argument("--incarnation", type=int, default=0, help="how many collectors of this run came before")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules, "torch was imported before the simulator started"

    settings, run = load_settings(arguments.run_dir / "config.yaml"), read_run(arguments.run_dir)
    log = configure(arguments.run_dir, "collector")
    progress = Progress.create(arguments.run_dir / "collector.progress")
    enable_stack_dumps(arguments.run_dir / "crash", "collector")
    stop = install_stop_flag()
    die_with_parent()
    die_first_when_memory_ends()  # the learner owns what must survive
    seed = settings.env.seed + 1000 * arguments.incarnation + 1_000_000 * run.num_resumes
    sizes = geometry(settings, num_envs(settings))
    simulator, code = None, ExitCode.FAILED

    def alive() -> None:
        progress.advance()
        if stop.requested:
            raise Disconnected("asked to stop")

    try:
        progress.phase("simulator")
        simulator = build_simulator(settings, seed=seed, device=arguments.device, crash_dir=arguments.run_dir / "crash")
        stop.install()  # simulators may have taken the handlers
        progress.phase("hello")
        channel = connect(run.socket_dir, deadline_s=settings.deadlines.start_s, alive=alive)

        import torch

        from collector_proc.collect import Collector

        # a simulator may have had to name its GPU differently; one on the CPU leaves the policy where it was told
        acting = torch.device(simulator.device if simulator.device.startswith("cuda") else arguments.device)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        collector = Collector(
            settings, sizes, simulator, channel, socket_dir=run.socket_dir, run_id=run.run_id,
            incarnation=arguments.incarnation, seed=seed + 7919, device=acting, progress=progress, stop=stop,
        )  # fmt: skip
        log.info("collecting", incarnation=arguments.incarnation, spec=simulator.spec.to_dict())
        collector.run()
        log.info("ended", agent_steps=collector.agent_steps, asked=stop.requested, outgrown=collector.outgrown)
        code = ExitCode.OUTGROWN if collector.outgrown else ExitCode.FINISHED
    except Disconnected:
        log.info("learner gone")
        code = ExitCode.FINISHED
    except (SettingError, SimulatorError, TransportError) as error:
        log.error("failed", error=str(error))
        if simulator is None:
            code = (
                ExitCode.REFUSED if arguments.incarnation == 0 else ExitCode.FAILED
            )  # later, it did start: memory, a port or a file being edited
        else:
            code = ExitCode.REFUSED if isinstance(error, SettingError) else ExitCode.FAILED
        if code == ExitCode.REFUSED:
            progress.refuse(str(error))
    finally:
        progress.phase("stopping")
        if simulator is not None:
            with ending.closing_deadline(settings.deadlines.stop_s / 2, code):
                simulator.close()
    return code


if __name__ == "__main__":
    ending.run(main)
