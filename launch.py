"""Start a run: read settings, make the run folder, start and watch both processes, pass their exit on. Torch-free."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from collector_proc.simulators.registry import check_env
from launcher.children import COMMANDS, REPO, Starter
from launcher.devices import Devices, choose_devices, list_gpus, precision_notes, visible_gpus
from launcher.display import Display, duration
from launcher.forwarding import STEP, Forwarder, check_logger, last_row, open_forwarder, summarize
from launcher.provenance import describe_run
from launcher.run_folder import (
    Kept,
    RunLock,
    check_unfinished,
    create_run_folder,
    default_run_dir,
    open_run_folder,
)
from launcher.watch import Outcome, Watch
from shared.compose import compose, config_names, load_settings, save_settings
from shared.config import Settings, check_settings, geometry_notes, num_envs
from shared.errors import SettingError
from shared.files import write_json
from shared.lifetime import install_stop_flag
from shared.logs import configure
from shared.run_folder import (
    RunFolder,
    checkpoint_step,
    make_socket_dir,
    newest_checkpoint,
    read_run,
    remove_socket_dir,
)

DEFAULT_CONFIG = "dm_control"
EPILOG = """\
settings are given as key=value, on top of the config:
  python launch.py env.name=walker env.task=walk optimization.autocast=false optimization.replay_ratio=null
every key, its unit and its default: shared/config.py

configs (configs/*.yaml): {configs}

exit codes:
  0    finished
  1    a process died and could not be replaced
  2    a setting or option cannot work, or a checkpoint does not fit it; nothing was trained
  130  ended by Ctrl-C, 143 by SIGTERM, 129 by a closed terminal: once training has begun, the learner has saved a
       checkpoint; --resume goes on from it
"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    config: str | None
    sim_gpu: int | None
    train_gpu: int | None
    run_dir: Path | None
    resume: Path | None
    overrides: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "see --help"
        if message.startswith("unrecognized arguments:"):
            flag = message.split()[2].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(flag, known, n=1)
            hint = f"write {nearest[0]}" if nearest else "settings are given as key=value, such as env.seed=3"
        raise SettingError(f"the command line cannot be read: {message}; wanted the options of --help; {hint}")


def parse_options(argv: Sequence[str]) -> Options:
    """Raises: SettingError on unknown options, missing values and options that exclude each other."""
    parser = _Parser(
        prog="launch.py",
        description="Train Dreamer with two processes: a collector with the simulator and a learner.",
        epilog=EPILOG.format(configs=", ".join(config_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME", help=f"a file of configs/ (default: {DEFAULT_CONFIG})")
    parser.add_argument("--sim-gpu", metavar="N", type=int, help="GPU of simulator and acting policy (default: 0)")
    parser.add_argument("--train-gpu", metavar="N", type=int, help="GPU of the learner (default: 1 if there is one)")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/ENV-TASK-TIME)")
    parser.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in this folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings, see below")
    parsed = parser.parse_intermixed_args(list(argv))
    if parsed.resume and (parsed.config or parsed.run_dir):
        raise SettingError(
            f"--resume {parsed.resume} brings its own config and folder, yet --config or --run-dir is given; "
            f"wanted --resume alone; leave the other out, settings may still follow as key=value"
        )
    return Options(**vars(parsed))


def read_settings(options: Options, say: Callable[[str], None]) -> Settings:
    """Settings that passed every check that needs no GPU; say tells what takes long. Raises: SettingError."""
    if options.resume:
        folder = RunFolder(options.resume.resolve())
        settings = load_settings(folder.config, options.overrides)
        check_unfinished(folder, settings)
    else:
        settings = compose(options.config or DEFAULT_CONFIG, options.overrides)
    check_env(settings, say)
    check_settings(settings, num_envs(settings))
    check_logger(settings)
    check_compiler(settings)
    return settings


def check_compiler(settings: Settings) -> None:
    """Pass if torch.compile finds the compiler it needs. Raises: SettingError."""
    compile = settings.optimization.compile
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if compile.enabled and compile.backend == "inductor" and not any(map(shutil.which, compilers)):
        raise SettingError(
            f"optimization.compile.enabled=true, but there is no C++ compiler ({' or '.join(compilers)}); wanted one on "
            "the PATH for torch.compile; run: apt install g++, or set optimization.compile.enabled=false"
        )


def find_devices(options: Options, settings: Settings) -> Devices:
    """Raises: SettingError if a flag or CUDA_VISIBLE_DEVICES names a GPU that is not there."""
    gpus, notes = list_gpus()
    visible = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    chosen = choose_devices(visible, sim=options.sim_gpu, train=options.train_gpu)
    return Devices(
        chosen.sim, chosen.train, notes + chosen.notes + precision_notes(chosen, settings.optimization.autocast)
    )


def main(argv: Sequence[str] | None = None, *, commands: Mapping[str, Sequence[str]] = COMMANDS) -> int:
    """Run to the end and return the exit code. commands: what starts each process, before its arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lock = None
    try:
        options = parse_options(argv)
        if options.resume:
            lock = open_run_folder(options.resume)  # before the checks of the settings, which may take long
        settings = read_settings(options, Display(Console()).say)
        devices = find_devices(options, settings)
        lock = lock or _new_folder(options, settings)
        return _run(argv, options, settings, devices, lock, commands)
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the watch took the signal: nothing runs yet
        sys.stderr.write("interrupted before anything was started\n")
        return 130
    finally:
        if lock is not None:
            lock.release()


def _new_folder(options: Options, settings: Settings) -> RunLock:
    return create_run_folder(options.run_dir or default_run_dir(settings))


def _run(
    argv: list[str],
    options: Options,
    settings: Settings,
    devices: Devices,
    lock: RunLock,
    commands: Mapping[str, Sequence[str]],
) -> int:
    folder, resumed, socket_dir = lock.folder, options.resume is not None, None
    try:
        try:
            socket_dir = make_socket_dir()
            forwarder = open_forwarder(settings, folder)
        except SettingError:
            if not resumed:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        before = None
        if resumed:
            before = read_run(folder.path)
            # A launch that was killed could not remove its sockets; the lock says that it is gone.
            remove_socket_dir(Path(before.socket_dir))
        kept, made_before = Kept.of(folder), _made(folder)
        save_settings(settings, folder.config)
        folder.summary.unlink(missing_ok=True)
        named = devices.names()
        write_json(
            folder.run_json,
            describe_run(settings, argv=argv, devices=named, socket_dir=socket_dir, before=before, repo=REPO),
        )
        try:
            outcome = _watch(Starter(folder, devices, os.environ, resumed, commands), settings, forwarder)
        finally:
            forwarder.close()
        if outcome.exit_code != 0 and resumed and not _went_on(folder, made_before):
            kept.put_back()  # nothing was trained: what stands there belongs to the steps that were
        return outcome.exit_code
    finally:
        if socket_dir is not None:
            remove_socket_dir(socket_dir)


def _made(folder: RunFolder) -> tuple[int, int, object]:
    """The newest checkpoint, when it was written, and when the last row was."""
    saved = newest_checkpoint(folder.checkpoints)
    step = checkpoint_step(saved) if saved is not None else 0
    written = (saved / "manifest.json").stat().st_mtime_ns if saved is not None else 0
    return step, written, last_row(folder.metrics).get("time")


def _went_on(folder: RunFolder, before: tuple[int, int, object]) -> bool:
    """Whether this launch left a checkpoint or a row; the learner may have cut rows that a crash left behind its checkpoint."""
    saved, written, row_time = _made(folder)
    if (saved, written) != before[:2]:
        return True
    return row_time != before[2] and int(last_row(folder.metrics).get(STEP) or 0) > saved


def _watch(starter: Starter, settings: Settings, forwarder: Forwarder) -> Outcome:
    """Watch the run to its end and leave summary.json behind, whatever the end was."""
    folder, began = starter.folder, time.monotonic()
    log, stop, display = configure(folder.path, "launch"), install_stop_flag(), Display(Console())
    watch = Watch(starter, settings, stop=stop, log=log, display=display, forwarder=forwarder)
    outcome = Outcome(1, "launch failed")
    _greet(display, starter, settings)
    display.start()
    try:
        outcome = watch.run()
    except Exception as error:
        outcome = Outcome(1, f"launch failed: {error!r}")
        raise
    finally:
        display.stop()
        own = {
            "exit_reason": outcome.reason,
            "launch_s": round(time.monotonic() - began, 3),
            "collector_restarts": watch.restarts,
            "devices": starter.devices.names(),
        }
        write_json(folder.summary, summarize(last_row(folder.metrics), own))
        log.info("ended", exit_code=outcome.exit_code, reason=outcome.reason)
        ended = duration(time.monotonic() - began)
        refused = outcome.exit_code == 2  # a refused resume leaves the summary that was there
        display.say(f"ended after {ended}" if refused else f"{outcome.reason} after {ended}; summary: {folder.summary}")
        if outcome.exit_code != 0 and (saved := newest_checkpoint(folder.checkpoints)) is not None:
            display.say(
                f"saved at step {checkpoint_step(saved):,}; go on with: python launch.py --resume {shown(folder.path)}"
            )
        if refused:
            display.say(f"error: {outcome.reason}")
        stop.restore()
    return outcome


def _greet(display: Display, starter: Starter, settings: Settings) -> None:
    devices = starter.devices
    display.say(f"run folder: {starter.folder.path}")
    for note in devices.notes:
        display.say(note)
    if devices.train is not None:
        names = devices.names()
        display.say(f"simulator on {names['sim']}, learner on {names['train']}")
    for note in geometry_notes(settings, num_envs(settings)):
        display.say(note)
    if starter.resume and (saved := newest_checkpoint(starter.folder.checkpoints)) is not None:
        display.say(f"going on from step {checkpoint_step(saved):,}")
    display.say("Ctrl-C saves a checkpoint and ends the run")


def shown(path: Path) -> Path:
    """As a person here would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
