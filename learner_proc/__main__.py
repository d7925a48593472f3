"""The learner process: `python -m learner_proc --run-dir DIR [--device cuda:0] [--resume]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from shared.checkpoints import CheckpointError
from shared.config import Settings
from shared.errors import HandoverError, SettingError, TransportError
from shared.gpu import check_gpu
from shared.lifetime import ExitCode
from shared.memory import is_out_of_memory
from shared.output import write_error
from shared.process import Process, start_process
from shared.socket_folder import remove_socket_dir


def main() -> int:
    """Run the learner process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner_proc", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder made by launch.py")
    parser.add_argument("--device", default="cpu", help="device of networks and replay")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run folder")
    arguments = parser.parse_args()
    try:
        process = start_process(arguments.run_dir, "learner")
    except SettingError as error:
        write_error(f"error: {error}\n")
        return ExitCode.REFUSED
    socket_dir = Path(process.run.socket_dir)
    # launch makes this folder and removes it. If the learner runs alone, the learner does both.
    runs_alone = not socket_dir.exists()
    socket_dir.mkdir(mode=0o700, exist_ok=True)
    try:
        return train(process, arguments.device, resume=arguments.resume)
    finally:
        if runs_alone:
            remove_socket_dir(socket_dir, is_own=True)


def train(process: Process, device: str, *, resume: bool) -> ExitCode:
    """Train until the end or until asked to stop; log an error that ends the training and return the exit code.

    REFUSED means that another start would fail in the same way: because of a setting, the checkpoint, the memory of the
    GPU or of the machine, or because the replay cannot be shared.
    """
    import torch  # only now: it takes seconds, and a signal that arrives meanwhile must find its handler installed

    from learner_proc.waiting import WaitingLearner

    prepare_torch(process.settings, device)
    learner = None
    try:
        check_gpu(device, autocast=process.settings.optimization.autocast)
        learner = WaitingLearner(process, device=torch.device(device), resume=resume).run()
        if learner is not None:  # None: the process was asked to stop
            learner.run()
        return ExitCode.FINISHED
    except (SettingError, HandoverError) as error:
        return _refuse(process, str(error))
    except torch.OutOfMemoryError as error:
        reason = out_of_memory(error, torch.cuda.memory_reserved())
        if learner is None:
            return _refuse(process, reason)  # the networks or the replay do not fit, so another start would fail too
        return _fail(process, reason)
    except (TransportError, FloatingPointError, CheckpointError) as error:
        return _fail(process, str(error))
    except (RuntimeError, OSError, MemoryError) as error:
        if learner is not None or not is_out_of_memory(error):
            raise
        return _refuse(process, out_of_host_memory(error))


def _fail(process: Process, reason: str) -> ExitCode:
    """Log the reason, pass it to launch, and return the exit code of a failure that another start may not repeat."""
    process.log.error("failed", error=reason)
    process.progress.refuse(reason)
    return ExitCode.FAILED


def _refuse(process: Process, reason: str) -> ExitCode:
    """Log the reason, pass it to launch, and return the exit code."""
    process.log.error("refused", error=reason)
    process.progress.refuse(reason)
    return ExitCode.REFUSED


def out_of_host_memory(error: BaseException) -> str:
    """Return what to do when the memory of the machine is not enough for the learner's start."""
    return (
        f"the machine has too little memory for the learner: {str(error).splitlines()[0]:.300}; expected replay and "
        "networks to fit; lower replay_buffer.buffer_size, or networks.hidden_dim and networks.rssm_hidden_dim"
    )


def out_of_memory(error: Exception, reserved_bytes: int) -> str:
    """Return what to do when the GPU's memory is not enough.

    Torch's own advice is expandable segments, which cannot be shared with the collector.
    """
    return (
        f"the GPU has too little memory for the learner, which holds {reserved_bytes / 1e9:.1f} GB of it: "
        f"{str(error).splitlines()[0]:.300}; expected replay, networks and one gradient step to fit; lower "
        "replay_buffer.batch_size or replay_buffer.buffer_size, set optimization.imagination_starts (for example "
        "8192), or keep the replay in host memory with replay_buffer.gpu_storage=false"
    )


def prepare_torch(settings: Settings, device: str) -> None:
    """Set what holds for the whole process: threads, memory, and the precision of matrix products."""
    import torch

    from learner_proc.startup import keep_freed_memory

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if device == "cpu":
        keep_freed_memory()
        return
    # Matrix products that autocast leaves in float32 are rounded to TF32, unless the user has turned autocast off.
    rounded = settings.optimization.autocast != "false"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded


if __name__ == "__main__":
    sys.exit(main())
