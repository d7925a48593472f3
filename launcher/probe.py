"""Check one simulator on this machine: `python launch.py probe --config isaaclab [key=value ...]`.

The probe starts the simulator as the collector would, takes random actions, checks the arrivals and closes the
simulator. There is no learner and no network. The output can be pasted into an issue.

Exit codes: 0 if every check passed, 1 if a check failed or a setting is wrong, 2 if an option is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator, check_env, find_backend
from launcher.devices import choose_torch_device
from launcher.provenance import package_versions
from shared.compose import compose
from shared.config import Settings
from shared.errors import SettingError, SimulatorError
from shared.geometry import count_envs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from collector_proc.simulators.base import Arrival, Simulator
    from shared.stream import StreamSpec

CLOSE_S = 30.0


@dataclass
class ProbeLog:
    """The lines that the probe prints. `failed` is true once a check has failed."""

    failed: bool = False

    def line(self, text: str) -> None:
        """Print a line at once."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def check(self, passed: bool, text: str) -> None:
        """Print the result of a check. text: what is true if it passed."""
        self.failed |= not passed
        self.line(f"{'ok    ' if passed else 'FAILED'} {text}")


def main(arguments: list[str] | None = None, *, prog: str = "python -m launcher.probe") -> int:
    """Run the probe and return its exit code.

    arguments: by default those of this process. prog: the command that the user typed, for the help.
    """
    options = _parse_options(arguments, prog)
    assert "torch" not in sys.modules, "torch was imported before the simulator started"
    log = ProbeLog()
    try:
        log_versions(log)
        settings = _read_settings(options, log)
        _probe(log, settings, device=options.device, num_ticks=options.ticks)
    except SettingError as error:
        log.check(False, str(error))
        return 1  # the message contains the fix, so the user needs no issue
    except SimulatorError as error:
        log.check(False, str(error))
    except Exception:
        log.check(False, traceback.format_exc())
    log.line("FAILED: please paste the lines above into an issue" if log.failed else "all checks passed")
    return int(log.failed)


def log_versions(log: ProbeLog) -> None:
    """Print the versions of Python and of the installed packages."""
    log.line(f"python {platform.python_version()}, {platform.platform()}")
    log.line(", ".join(f"{name} {version}" for name, version in package_versions().items()))


class StreamCheck:
    """Compares every arrival of a simulator with the stream's spec and with the arrival before it.

    well_formed: shapes and dtypes are those of the spec. finite: no observation and no reward is NaN or infinite.
    flags_agree: an episode begins exactly where the one before it ended, and every terminal row is a last row.
    num_ends, num_terminal: the episodes that ended, and those of them that ended by themselves.
    num_same: last observations that equal the first observation of the next episode, so they were overwritten.
    num_stale: last observations that equal the observation one step earlier, so they may be too old.
    """

    def __init__(self, first: Arrival, spec: StreamSpec) -> None:
        """first: the arrival of `reset`."""
        self.well_formed = self.finite = self.flags_agree = True
        self.num_ends = self.num_terminal = self.num_same = self.num_stale = 0
        self.lowest_reward, self.highest_reward = float("inf"), -float("inf")
        self._expected = {name: (entry.shape, entry.dtype) for name, entry in spec.obs.items()}
        self._take(first)

    def add(self, arrival: Arrival) -> None:
        """Check the arrival of one step. A row that diverged is first and last at once, and is no end of an episode."""
        began, ended = arrival.is_first & ~arrival.is_last, arrival.is_last & ~arrival.is_first
        self.flags_agree &= bool((arrival.is_first | ~self._last).all()) and bool((self._last | ~began).all())
        self.flags_agree &= bool((arrival.is_last | ~arrival.is_terminal).all())
        if arrival.acting_obs is None:
            self.num_same += _num_equal(self._obs, arrival.obs, self._last & began)
        else:
            self.num_same += _num_equal(arrival.obs, arrival.acting_obs, ended)
        self.num_stale += _num_equal(self._obs, arrival.obs, ended)
        complete = arrival.is_last if arrival.diverged is None else arrival.is_last & ~arrival.diverged
        self.num_ends += int(complete.sum())
        self.num_terminal += int(arrival.is_terminal.sum())
        self._take(arrival)

    def _take(self, arrival: Arrival) -> None:
        """Check the values of one arrival, and keep what the next one is compared with."""
        self._last = arrival.is_last.clone()
        self._obs = {name: entry.clone() for name, entry in arrival.obs.items()}
        self.well_formed &= {name: _format(entry) for name, entry in arrival.obs.items()} == self._expected
        values = [arrival.reward, *(entry for entry in arrival.obs.values() if entry.is_floating_point())]
        self.finite &= all(bool(value.isfinite().all()) for value in values)
        self.lowest_reward = min(self.lowest_reward, float(arrival.reward.min()))
        self.highest_reward = max(self.highest_reward, float(arrival.reward.max()))


def _parse_options(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    """Return the options. If one is wrong, print why and raise SystemExit with code 2."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=f"example:\n  {prog} --config quickstart --ticks 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a file of configs/, as for launch.py")
    parser.add_argument("--device", help="cpu or cuda:0; default: cuda:0 if there is a GPU, as launch.py chooses")
    parser.add_argument("--ticks", type=int, default=100, help="number of steps of all environments")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the config")
    options = parser.parse_intermixed_args(arguments)
    if options.ticks < 1:
        parser.error(f"--ticks {options.ticks} takes no step; expected at least 1; leave it out to take 100 steps")
    try:
        options.device = choose_torch_device(options.device)
    except SettingError as error:
        parser.error(str(error))
    return options


def _read_settings(options: argparse.Namespace, log: ProbeLog) -> Settings:
    """Return settings that passed the checks. Raises: SettingError."""
    settings = compose(options.config, options.overrides)
    check_env(settings, log.line)
    env = settings.env
    if env.horizon is None and not find_backend(env.backend).horizon_may_be_refused:
        env.horizon = max(2, options.ticks // 3)  # so that episodes end while the probe runs
    return settings


def _probe(log: ProbeLog, settings: Settings, *, device: str, num_ticks: int) -> None:
    """Start, step and close the simulator. Raises: SettingError, SimulatorError."""
    env = settings.env
    task = f"{env.name} {env.task}".strip()
    log.line(f"{env.backend} {task}, {count_envs(settings)} environments, {device}, horizon {env.horizon}")
    with _crash_dir() as crash_dir:
        log.line(f"states that are not finite are written to {crash_dir}")
        began = time.monotonic()
        simulator = build_simulator(settings, seed=env.seed, device=device, crash_dir=crash_dir)
        log.check(True, f"started in {time.monotonic() - began:.1f} s, on {simulator.device}")
        try:
            log.line(f"streams {simulator.spec.to_dict()}")
            _log_stream(log, _step(log, simulator, num_ticks), num_ticks)
            log.check(simulator.num_diverged == 0, f"{simulator.num_diverged} rows diverged")
        finally:
            began = time.monotonic()
            with ending.closing_deadline(CLOSE_S, 1):
                simulator.close()
            log.check(True, f"closed in {time.monotonic() - began:.1f} s")


@contextlib.contextmanager
def _crash_dir() -> Iterator[Path]:
    """Make a folder for the states that are not finite, and remove it at the end if there were none."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-probe-"))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def _step(log: ProbeLog, simulator: Simulator, num_ticks: int) -> StreamCheck:
    """Reset all environments, step them with uniform random actions, and return what the arrivals showed."""
    import torch

    spec = simulator.spec
    generator = torch.Generator().manual_seed(0)
    first = simulator.reset()
    log.check(bool(first.is_first.all()), "reset begins an episode in every environment")
    seen = StreamCheck(first, spec)
    began = time.monotonic()
    for _ in range(num_ticks):
        action = torch.rand(spec.num_envs, spec.action_dim, generator=generator) * 2 - 1
        seen.add(simulator.step(action.to(simulator.device)))
    pace = num_ticks * spec.num_envs / (time.monotonic() - began)
    log.line(f"{pace:,.0f} agent steps/s in {num_ticks} ticks of random actions")
    return seen


def _log_stream(log: ProbeLog, seen: StreamCheck, num_ticks: int) -> None:
    """Print what the arrivals showed."""
    log.line(f"rewards are between {seen.lowest_reward:.4g} and {seen.highest_reward:.4g}")
    log.check(seen.well_formed, "shapes and dtypes are those of the stream")
    log.check(seen.finite, "every observation and reward is finite")
    log.check(seen.flags_agree, "is_first follows is_last, and terminal rows are last rows")
    log.line(f"{seen.num_ends} episodes ended, {seen.num_terminal} of them terminal")
    if not seen.num_ends:
        log.line(
            f"warning: no episode ended in {num_ticks} ticks, so last observations were not checked; "
            "use more --ticks, or set env.horizon=10"
        )
    log.check(
        seen.num_same == 0,
        f"last observations differ from the first ones of the next episodes ({seen.num_same} are equal)",
    )
    if seen.num_stale:
        log.line(
            f"warning: {seen.num_stale} last observations equal those one step earlier; "
            "this is right only if the task did not move in that step"
        )


def _format(entry: Tensor) -> tuple[tuple[int, ...], str]:
    """Return the shape and dtype of one environment's entry, as `ObsSpec` has them."""
    return tuple(entry.shape[1:]), str(entry.dtype).removeprefix("torch.")


def _num_equal(one: dict[str, Tensor], other: dict[str, Tensor], mask: Tensor) -> int:
    """Return in how many of the environments in the mask (E,) all entries are equal."""
    equal = mask.clone()
    for name, entry in one.items():
        equal &= (entry == other[name]).reshape(len(entry), -1).all(-1)
    return int(equal.sum())


if __name__ == "__main__":
    ending.run(main)
