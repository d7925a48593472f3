"""A self-check of one simulator on this machine: `python -m launcher.probe --config isaaclab [key=value ...]`.

Launches it as the collector would, takes random actions, looks at what arrives, closes it, and prints a report to paste into
an issue. No learner, no networks. Exit code 0 if everything held, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector_proc.simulators import ending
from collector_proc.simulators.registry import build_simulator, check_env
from launcher.devices import list_gpus, visible_gpus
from shared.compose import compose
from shared.config import Settings
from shared.errors import SettingError, SimulatorError
from shared.geometry import count_envs

if TYPE_CHECKING:
    from torch import Tensor

    from collector_proc.simulators.base import Arrival, Simulator
    from shared.stream import StreamSpec

PACKAGES = (
    "torch",
    "isaaclab",
    "isaacsim",
    "mjlab",
    "mujoco",
    "dm_control",
    "torchrl",
    "gymnasium",
    "warp-lang",
    "numpy",
)
CLOSE_S = 30.0
OWN_TIME_OUTS = ("isaaclab", "mjlab")  # a task of theirs may have none, which a horizon could move


@dataclass
class Report:
    """Lines for a person, and whether one of them says that something is wrong."""

    lines: list[str] = field(default_factory=list)
    failed: bool = False

    def say(self, text: str) -> None:
        self.lines.append(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def check(self, holds: bool, text: str) -> None:
        self.failed |= not holds
        self.say(f"{'ok    ' if holds else 'FAILED'} {text}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.probe", description=__doc__)
    parser.add_argument("--config", required=True, help="a file of configs/, as for launch.py")
    parser.add_argument("--device", help="cpu or cuda:0; default: cuda:0 where there is a GPU, as launch.py chooses")
    parser.add_argument("--ticks", type=int, default=100, help="steps of all environments")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config")
    options = parser.parse_args()
    assert "torch" not in sys.modules, "torch was imported before the simulator started"
    report = Report()
    try:
        settings = compose(options.config, options.overrides)
        if settings.env.horizon is None and settings.env.backend not in OWN_TIME_OUTS:
            settings.env.horizon = max(2, options.ticks // 3)  # so that episodes end while somebody looks
        device = options.device or _default_device()
        _say_versions(report, settings, device)
        _probe(report, settings, device=device, num_ticks=options.ticks)
    except SettingError as error:
        report.check(False, str(error))
        return 1  # a setting or a missing package, which the line above mends: no issue to open
    except SimulatorError as error:
        report.check(False, str(error))
    except Exception:
        report.check(False, traceback.format_exc())
    report.say("FAILED: please paste the lines above into an issue" if report.failed else "everything held")
    return int(report.failed)


def _default_device() -> str:
    return "cuda:0" if visible_gpus(list_gpus()[0], os.environ.get("CUDA_VISIBLE_DEVICES")) else "cpu"


def _say_versions(report: Report, settings: Settings, device: str) -> None:
    report.say(f"python {platform.python_version()}, {platform.platform()}")
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    report.say(", ".join(found))
    env = settings.env
    report.say(
        f"{env.backend} {env.name} {env.task}, {count_envs(settings)} environments, {device}, horizon {env.horizon}"
    )


def _probe(report: Report, settings: Settings, *, device: str, num_ticks: int) -> None:
    check_env(settings, report.say)
    began = time.monotonic()
    crash_dir = Path(tempfile.mkdtemp(prefix="tandem-probe-"))
    report.say(f"states that are not finite go to {crash_dir}")
    simulator = build_simulator(settings, seed=settings.env.seed, device=device, crash_dir=crash_dir)
    report.check(True, f"started in {time.monotonic() - began:.1f} s, on {simulator.device}")
    try:
        report.say(f"streams {simulator.spec.to_dict()}")
        _check_stream(report, simulator, num_ticks)
    finally:
        began = time.monotonic()
        with ending.closing_deadline(CLOSE_S, 1):
            simulator.close()
        report.check(True, f"closed in {time.monotonic() - began:.1f} s")


def _check_stream(report: Report, simulator: Simulator, num_ticks: int) -> None:
    import torch

    spec = simulator.spec
    generator = torch.Generator().manual_seed(0)
    seen = _Seen(simulator.reset(), spec)
    report.check(bool(seen.arrival.is_first.all()), "reset begins an episode in every environment")
    began = time.monotonic()
    for _ in range(num_ticks):
        action = torch.rand(spec.num_envs, spec.action_dim, generator=generator) * 2 - 1
        seen.add(simulator.step(action.to(simulator.device)))
    pace = num_ticks * spec.num_envs / (time.monotonic() - began)
    report.say(f"{pace:,.0f} agent steps/s in {num_ticks} ticks of random actions, {seen.rewards} as rewards")
    report.check(seen.well_formed, "shapes and dtypes are those of the stream")
    report.check(seen.finite, "every observation and reward is finite")
    report.check(seen.flags_agree, "is_first follows is_last, terminal rows are last rows")
    report.say(f"{seen.num_ends} episodes ended, {seen.num_terminal} of them terminal")
    if not seen.num_ends:
        report.say(
            f"no time-out in {num_ticks} ticks: nothing is known of last observations; more --ticks, or env.horizon=10"
        )
    report.check(seen.num_same == 0, f"last observations differ from those that follow ({seen.num_same} do not)")
    if seen.num_stale:
        report.say(
            f"warning: {seen.num_stale} last observations equal those before them; right only if the task stood still"
        )
    diverged = getattr(simulator, "num_diverged", 0)
    report.check(diverged == 0, f"{diverged} rows diverged")


class _Seen:
    """What held over all arrivals so far."""

    def __init__(self, arrival: Arrival, spec: StreamSpec) -> None:
        self._spec = spec
        self.well_formed = self.finite = self.flags_agree = True
        self.num_ends = self.num_terminal = self.num_same = self.num_stale = 0
        self._low, self._high = float("inf"), -float("inf")
        self._take(arrival)

    @property
    def rewards(self) -> str:
        return f"{self._low:.4g} .. {self._high:.4g}"

    def add(self, arrival: Arrival) -> None:
        """Compare a tick with the one before it. Where the simulator diverged, a row is first and last at once."""
        last, obs = self._last, self._obs
        began = arrival.is_first & ~arrival.is_last
        self.flags_agree &= bool((arrival.is_first | ~last).all()) and bool((last | ~began).all())
        self.flags_agree &= bool((arrival.is_last | ~arrival.is_terminal).all())
        if arrival.acting_obs is None:
            self.num_same += _num_same(obs, arrival.obs, last & began)
        else:
            self.num_same += _num_same(arrival.obs, arrival.acting_obs, arrival.is_last & ~arrival.is_first)
        self.num_stale += _num_same(obs, arrival.obs, arrival.is_last & ~arrival.is_first)
        self.num_ends += int(arrival.is_last.sum())
        self.num_terminal += int(arrival.is_terminal.sum())
        self._take(arrival)

    def _take(self, arrival: Arrival) -> None:
        self.arrival, self._last = arrival, arrival.is_last.clone()
        self._obs = {name: entry.clone() for name, entry in arrival.obs.items()}
        met = {name: (tuple(entry.shape[1:]), str(entry.dtype).split(".")[1]) for name, entry in arrival.obs.items()}
        self.well_formed &= met == {name: (entry.shape, entry.dtype) for name, entry in self._spec.obs.items()}
        values: list[Any] = [arrival.reward, *(entry for entry in arrival.obs.values() if entry.is_floating_point())]
        self.finite &= all(bool(value.isfinite().all()) for value in values)
        self._low, self._high = (
            min(self._low, float(arrival.reward.min())),
            max(self._high, float(arrival.reward.max())),
        )


def _num_same(before: dict[str, Tensor], after: dict[str, Tensor], where: Tensor) -> int:
    """Environments, of those in the mask, in which no entry differs at all."""
    same = where.clone()
    for name, entry in before.items():
        same &= (entry == after[name]).reshape(len(entry), -1).all(-1)
    return int(same.sum())


if __name__ == "__main__":
    ending.run(main)
