"""One run, from its run folder to its summary. Torch-free."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launcher.children import Starter
from launcher.devices import find_devices
from launcher.display import Display, duration
from launcher.ending import Outcome
from launcher.events import Events
from launcher.forwarding import FallibleForwarder, RowRelay, last_row, open_forwarder, summarize, warning_texts
from launcher.main import ROOT
from launcher.parser import command_name
from launcher.provenance import describe_run
from launcher.reports import Reports
from launcher.run_folder import (
    ResumeUndo,
    RunIsComplete,
    create_run_folder,
    discard_run_folder,
    make_default_run_dir,
    open_run_folder,
)
from launcher.settings import check_gpu_compiler, read_settings
from launcher.watch import run_processes
from shared.checkpoints import damaged_checkpoints, newest_checkpoint
from shared.compose import save_settings
from shared.errors import SettingError
from shared.files import private_files, write_json
from shared.geometry import geometry_notes
from shared.lifetime import ExitCode, SaveFlag, StopFlag, StopRequested, install_stop_flag
from shared.logs import configure
from shared.output import write_error
from shared.run_folder import (
    Run,
    read_run,
)
from shared.socket_folder import make_socket_dir, remove_socket_dir

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from launcher.options import Options
    from shared.config import Settings
    from shared.run_folder import RunFolder


def run(options: Options, argv: list[str], commands: Mapping[str, Sequence[str]]) -> int:
    """Do one run, new or resumed, to its end and return the exit code.

    argv: the command line, for run.json. commands: the command that starts each process, before its arguments.
    Raises: SettingError if the run cannot start as it is set; a new run then leaves no folder behind.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # between the end of the watch and that of the process
    stop, save = install_stop_flag(signal.SIGUSR1), SaveFlag()
    save.install()
    try:
        with ExitStack() as stack:
            ready = _get_ready(options, argv, commands, stop, stack)
            return ExitCode.FINISHED if ready is None else _train(ready, stop, save)
    except StopRequested:
        assert stop.signum is not None
        write_error(f"interrupted by {signal.Signals(stop.signum).name} before anything was started\n")
        return 128 + stop.signum
    finally:
        stop.restore()
        save.restore()
        signal.signal(signal.SIGUSR1, before)


@dataclass(frozen=True)
class _Ready:
    """A run whose settings are checked and whose folder is locked."""

    starter: Starter
    settings: Settings
    prepared: _Prepared


def _get_ready(
    options: Options, argv: list[str], commands: Mapping[str, Sequence[str]], stop: StopFlag, stack: ExitStack
) -> _Ready | None:
    """Return a run that can start, or None if nothing is left to do. `stack` closes what was opened.

    Raises: SettingError; StopRequested if a signal arrives, which interrupts everything here.
    """
    try:
        with stop.interrupting():
            return _check_and_prepare(options, argv, commands, stack)
    except Exception:
        stop.check()  # other code may have turned the interruption into an error of its own
        raise


def _check_and_prepare(
    options: Options, argv: list[str], commands: Mapping[str, Sequence[str]], stack: ExitStack
) -> _Ready | None:
    stack.enter_context(private_files())
    lock, options = None, options.decided()
    if options.resume is not None:  # The lock comes first, because the checks of the settings may take long.
        lock = stack.enter_context(open_run_folder(options.resume))
    show = Display(Console()).print_line
    try:
        settings = read_settings(options, show)
    except RunIsComplete as complete:
        if not options.auto:
            raise
        show(f"nothing is left to do: {complete}")
        return None
    devices = find_devices(
        sim=options.sim_gpu,
        train=options.train_gpu,
        autocast=settings.optimization.autocast,
        gpu_storage=settings.replay_buffer.gpu_storage is not False,
        environ=os.environ,
    )
    check_gpu_compiler(settings, devices)
    if lock is None:
        path = options.run_dir or make_default_run_dir(settings)
        lock = stack.enter_context(create_run_folder(path, set_aside=options.auto))
    starter = Starter(lock.folder, devices, os.environ, resume=options.resume is not None, commands=commands)
    return _Ready(starter, settings, _prepare_or_discard(starter, settings, argv, stack))


def _prepare_or_discard(starter: Starter, settings: Settings, argv: list[str], stack: ExitStack) -> _Prepared:
    """Prepare the locked run folder. If that is not possible or is interrupted, discard the folder of a new run."""
    folder = starter.folder
    try:
        return _prepare(starter, settings, argv, stack)
    except (SettingError, OSError, StopRequested) as error:
        if not starter.resume:
            discard_run_folder(folder)
        if not isinstance(error, OSError):
            raise
        raise SettingError(
            f"cannot prepare the run folder {folder.path}: {error}; expected files that this user may write, on a "
            "disk with free space; correct this, or give another --run-dir"
        ) from error


def _train(ready: _Ready, stop: StopFlag, save: SaveFlag) -> int:
    """Run both processes in the prepared run folder, and return the exit code."""
    prepared = ready.prepared
    outcome = _watch(ready, stop, save)
    if prepared.undo is not None and outcome.exit_code != ExitCode.FINISHED and prepared.relay.num_rows == 0:
        prepared.undo.unless_saved()
    return outcome.exit_code


@dataclass(frozen=True)
class _Prepared:
    """What a run needs beside its two processes. undo: only for a resumed run."""

    log: FilteringBoundLogger
    relay: RowRelay
    undo: ResumeUndo | None


def _prepare(starter: Starter, settings: Settings, argv: list[str], stack: ExitStack) -> _Prepared:
    """Open the log and the logging backend, and write config.yaml and run.json. `stack` closes what was opened."""
    folder = starter.folder
    log = configure(folder.path, "launch")
    socket_dir = make_socket_dir()
    stack.callback(_remove_sockets, socket_dir, log, is_own=True)
    forwarder = FallibleForwarder(open_forwarder(settings, folder), settings.logger.backend, log)
    stack.callback(forwarder.close)
    relay = RowRelay(folder.metrics, forwarder, log)
    undo = ResumeUndo(folder) if starter.resume else None
    _describe(starter, settings, argv, socket_dir, log)
    return _Prepared(log, relay, undo)


def _describe(
    starter: Starter, settings: Settings, argv: list[str], socket_dir: Path, log: FilteringBoundLogger
) -> None:
    """Write config.yaml and run.json, which both processes read when they start."""
    folder, before = starter.folder, None
    if starter.resume:
        before = _previous_launch(folder, log)
        # If the previous launch was killed, its socket folder is still there. It has ended, because we have the lock.
        # But if this folder is a copy of a run, the launch that uses the original may still be active.
        if before.run_dir == str(folder.path):
            _remove_sockets(Path(before.socket_dir), log)
    save_settings(settings, folder.config)
    folder.summary.unlink(missing_ok=True)
    description = describe_run(
        settings,
        argv=argv,
        devices=starter.devices.names(),
        run_dir=folder.path,
        socket_dir=socket_dir,
        before=before,
        repo=ROOT,
    )
    write_json(folder.run_json, description)


def _remove_sockets(socket_dir: Path, log: FilteringBoundLogger, *, is_own: bool = False) -> None:
    """Remove a folder of sockets if that is safe, and log why it was left if it is not."""
    reason = remove_socket_dir(socket_dir, is_own=is_own)
    if reason is not None:
        log.info("a folder of sockets was left", folder=str(socket_dir), reason=reason)


def _previous_launch(folder: RunFolder, log: FilteringBoundLogger) -> Run:
    """Return what run.json states about the previous launch, or an empty description if it cannot be read."""
    try:
        return read_run(folder.path)
    except SettingError as error:
        log.warning("run.json is damaged, so the earlier launches of this run are forgotten", reason=str(error))
        return Run(run_id="", socket_dir="")


def _watch(ready: _Ready, stop: StopFlag, save: SaveFlag) -> Outcome:
    """Run both processes to the end of the run and write summary.json, even if launch itself fails."""
    starter, settings, prepared = ready.starter, ready.settings, ready.prepared
    folder, log, began = starter.folder, prepared.log, time.monotonic()
    display, reports = Display(Console()), Reports(starter, settings, log)
    outcome = Outcome(ExitCode.FAILED, "launch failed")
    for line in _opening_lines(starter, settings):
        display.print_line(line)
    display.start()
    try:
        outcome = run_processes(
            starter, settings, stop=stop, save=save, reports=reports, log=log, display=display, relay=prepared.relay
        )
    except Exception as error:
        outcome = _failure(error, folder)
        log.info("launch failed", exc_info=True)  # a warning would show the traceback to the user
        if not isinstance(error, OSError):
            raise
    finally:
        display.stop()
        seconds = time.monotonic() - began
        problem, signals = _write_summary(starter, outcome, reports.events, seconds), stop.count
        reports.end(outcome)
        log.info("ended", exit_code=outcome.exit_code, reason=outcome.reason)
        trained = prepared.relay.num_rows > 0
        for line in [*problem, *_closing_lines(outcome, starter, settings, seconds=seconds, trained=trained)]:
            display.print_line(line)
        reports.close(give_up=lambda: stop.count > signals)
        stop.restore()
    return outcome


def _failure(error: Exception, folder: RunFolder) -> Outcome:
    """Return the outcome of a run in which launch itself failed."""
    if not folder.path.is_dir():
        return Outcome(ExitCode.FAILED, f"the run folder {folder.path} was deleted while it was in use")
    return Outcome(ExitCode.FAILED, f"launch failed: {error if isinstance(error, OSError) else repr(error)}")


def _write_summary(starter: Starter, outcome: Outcome, events: Events, seconds: float) -> list[str]:
    """Write summary.json. Return a line for the user if that was not possible."""
    folder = starter.folder
    own = {
        "exit_reason": outcome.reason,
        "launch_s": round(seconds, 3),
        "collector_restarts": starter.restarts,
        "collector_restart_causes": events.causes("collector"),
        "learner_restarts": starter.incarnation("learner"),
        "learner_restart_causes": events.causes("learner"),
        "devices": starter.devices.names(),
    }
    try:
        own["warnings"] = warning_texts(folder.warnings("learner"))
        write_json(folder.summary, summarize(last_row(folder.metrics), own))
    except OSError as error:  # it must not hide how the run ended
        return [f"{folder.summary} could not be written: {error}"]
    return []


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
        damaged = damaged_checkpoints(starter.folder.checkpoints)
        lines += [f"skipping the damaged checkpoint {path}: {damage}" for path, damage in damaged]
        lines.append(f"continuing from step {saved.manifest.step:,}, checkpoint {saved.folder}")
    return [*lines, "Ctrl-C saves a checkpoint and ends the run"]


def _closing_lines(
    outcome: Outcome, starter: Starter, settings: Settings, *, seconds: float, trained: bool
) -> list[str]:
    """Return how the run ended and how it can be continued. An error comes last, where it is seen.

    trained: whether this launch wrote a row of metrics.
    """
    folder, refused = starter.folder, outcome.exit_code == ExitCode.REFUSED
    ended = f"ended after {duration(seconds)}"
    lines = [ended] if refused else [f"{ended}: {outcome.reason}", f"summary: {folder.summary}"]
    saved = newest_checkpoint(folder.checkpoints)
    step = saved.manifest.step if saved is not None else 0
    # A resume that failed before it trained would fail in the same way again.
    in_vain = starter.resume and not trained and outcome.exit_code in (ExitCode.FAILED, ExitCode.REFUSED)
    if 0 < step < settings.optimization.total_optim_steps and not in_vain:
        command = f"{command_name()} --resume {_as_typed(folder.path)}"
        lines.append(f"a checkpoint of step {step:,} is saved; continue with: {command}")
    return [*lines, f"error: {outcome.reason}"] if refused else lines


def _as_typed(path: Path) -> Path:
    """Return the path relative to the current folder if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
