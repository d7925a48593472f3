"""One run, from its run folder to its summary. Torch-free."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launcher.children import ROOT, Starter
from launcher.devices import find_devices
from launcher.display import Display, duration
from launcher.ending import Outcome
from launcher.forwarding import RowRelay, last_row, open_forwarder, summarize
from launcher.options import command_name
from launcher.provenance import describe_run
from launcher.run_folder import ResumeUndo, create_run_folder, default_run_dir, open_run_folder
from launcher.settings import check_gpu_compiler, read_settings
from launcher.watch import run_processes
from shared.compose import save_settings
from shared.errors import SettingError
from shared.files import write_json
from shared.geometry import geometry_notes
from shared.lifetime import ExitCode, install_stop_flag
from shared.logs import configure
from shared.run_folder import checkpoint_step, make_socket_dir, newest_checkpoint, read_run, remove_socket_dir

if TYPE_CHECKING:
    from launcher.forwarding import Forwarder
    from launcher.options import Options
    from shared.config import Settings
    from shared.run_folder import RunFolder


def run(options: Options, argv: list[str], commands: Mapping[str, Sequence[str]]) -> int:
    """Do one run, new or resumed, to its end and return the exit code.

    argv: the command line, for run.json. commands: the command that starts each process, before its arguments.
    Raises: SettingError if the run cannot start as it is set; a new run then leaves no folder behind.
    """
    with ExitStack() as stack:
        lock = None
        if options.resume:  # The lock comes first, because the checks of the settings may take long.
            lock = stack.enter_context(open_run_folder(options.resume))
        settings = read_settings(options, Display(Console()).print_line)
        devices = find_devices(
            sim=options.sim_gpu,
            train=options.train_gpu,
            autocast=settings.optimization.autocast,
            gpu_storage=settings.replay_buffer.gpu_storage is not False,
            environ=os.environ,
        )
        check_gpu_compiler(settings, devices)
        if lock is None:
            lock = stack.enter_context(create_run_folder(options.run_dir or default_run_dir(settings)))
        starter = Starter(lock.folder, devices, os.environ, resume=options.resume is not None, commands=commands)
        return _train(starter, settings, argv)


def _train(starter: Starter, settings: Settings, argv: list[str]) -> int:
    """Prepare the locked run folder, run both processes in it, and return the exit code."""
    folder = starter.folder
    with ExitStack() as stack:
        try:
            socket_dir = make_socket_dir()
            stack.callback(remove_socket_dir, socket_dir)
            forwarder = open_forwarder(settings, folder)
            stack.callback(forwarder.close)
        except SettingError:
            if not starter.resume:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        undo = ResumeUndo(folder) if starter.resume else None
        _describe(starter, settings, argv, socket_dir)
        outcome, num_rows = _watch(starter, settings, forwarder)
        if undo is not None and outcome.exit_code != ExitCode.FINISHED and num_rows == 0:
            undo.unless_saved()
        return outcome.exit_code


def _describe(starter: Starter, settings: Settings, argv: list[str], socket_dir: Path) -> None:
    """Write config.yaml and run.json, which both processes read when they start."""
    folder, before = starter.folder, None
    if starter.resume:
        before = read_run(folder.path)
        # If the previous launch was killed, its socket folder is still there. It has ended, because we have the lock.
        remove_socket_dir(Path(before.socket_dir))
    save_settings(settings, folder.config)
    folder.summary.unlink(missing_ok=True)
    description = describe_run(
        settings, argv=argv, devices=starter.devices.names(), socket_dir=socket_dir, before=before, repo=ROOT
    )
    write_json(folder.run_json, description)


def _watch(starter: Starter, settings: Settings, forwarder: Forwarder) -> tuple[Outcome, int]:
    """Run both processes to the end of the run and write summary.json, even if launch itself fails.

    Returns: the outcome, and the number of metrics rows that the learner wrote meanwhile.
    """
    folder, began = starter.folder, time.monotonic()
    log, stop, display = configure(folder.path, "launch"), install_stop_flag(), Display(Console())
    relay = RowRelay(folder.metrics, forwarder, log)
    outcome = Outcome(ExitCode.FAILED, "launch failed")
    for line in _opening_lines(starter, settings):
        display.print_line(line)
    display.start()
    try:
        outcome = run_processes(starter, settings, stop=stop, log=log, display=display, relay=relay)
    except Exception as error:
        outcome = Outcome(ExitCode.FAILED, f"launch failed: {error!r}")
        raise
    finally:
        display.stop()
        own = {
            "exit_reason": outcome.reason,
            "launch_s": round(time.monotonic() - began, 3),
            "collector_restarts": starter.restarts,
            "devices": starter.devices.names(),
        }
        write_json(folder.summary, summarize(last_row(folder.metrics), own))
        log.info("ended", exit_code=outcome.exit_code, reason=outcome.reason)
        for line in _closing_lines(outcome, folder, time.monotonic() - began):
            display.print_line(line)
        stop.restore()
    return outcome, relay.num_rows


def _opening_lines(starter: Starter, settings: Settings) -> list[str]:
    """Return what the user should know before the two processes start."""
    devices = starter.devices
    lines = [f"run folder: {starter.folder.path}", *devices.notes]
    if devices.train is not None:
        names = devices.names()
        lines.append(f"simulator on {names['sim']}, learner on {names['train']}")
    lines += geometry_notes(settings)
    saved = newest_checkpoint(starter.folder.checkpoints)
    if starter.resume and saved is not None:
        lines.append(f"continuing from step {checkpoint_step(saved):,}")
    return [*lines, "Ctrl-C saves a checkpoint and ends the run"]


def _closing_lines(outcome: Outcome, folder: RunFolder, seconds: float) -> list[str]:
    """Return how the run ended and how it can be continued. An error comes last, where it is seen."""
    refused = outcome.exit_code == ExitCode.REFUSED
    ended = f"ended after {duration(seconds)}"
    lines = [ended] if refused else [f"{ended}: {outcome.reason}", f"summary: {folder.summary}"]
    saved = newest_checkpoint(folder.checkpoints)
    if outcome.exit_code != ExitCode.FINISHED and saved is not None:
        step, path = checkpoint_step(saved), _as_typed(folder.path)
        lines.append(f"a checkpoint of step {step:,} is saved; continue with: {command_name()} --resume {path}")
    return [*lines, f"error: {outcome.reason}"] if refused else lines


def _as_typed(path: Path) -> Path:
    """Return the path relative to the current folder if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
