"""Entry of the learner: `python -m learner_proc --run-dir DIR [--device cuda:0] [--resume]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from shared.errors import SettingError, TransportError
from shared.lifetime import ExitCode
from shared.process import start_process
from shared.run_folder import remove_socket_dir


def main() -> int:
    """Exit codes: 0 finished or asked to stop, 2 a checkpoint or setting that does not fit, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m learner_proc", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder made by launch.py")
    parser.add_argument("--device", default="cpu", help="device of networks and replay")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    arguments = parser.parse_args()
    process = start_process(arguments.run_dir, "learner")
    settings, run, log, progress = process.settings, process.run, process.log, process.progress

    import torch  # after the stop flag is installed, because it takes seconds in which a signal may arrive

    from learner_proc.startup import keep_freed_memory
    from learner_proc.waiting import WaitingLearner

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if arguments.device == "cpu":
        keep_freed_memory()
    else:
        # what is not cast; float32 asked for by name stays float32
        rounded = settings.optimization.autocast != "false"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded
    made_socket_dir = not Path(run.socket_dir).exists()  # launch removes its own; run alone, this process makes one
    Path(run.socket_dir).mkdir(mode=0o700, exist_ok=True)
    try:
        learner = WaitingLearner(process, device=torch.device(arguments.device), resume=arguments.resume).run()
        if learner is not None:  # None: the process was asked to stop
            learner.run()
        return ExitCode.FINISHED
    except SettingError as error:
        log.error("refused", error=str(error))
        progress.refuse(str(error))
        return ExitCode.REFUSED
    except (TransportError, FloatingPointError) as error:
        log.error("failed", error=str(error))
        return ExitCode.FAILED
    finally:
        if made_socket_dir:
            remove_socket_dir(Path(run.socket_dir))


if __name__ == "__main__":
    sys.exit(main())
