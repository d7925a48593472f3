"""`python launch.py probe`: check one simulator on this machine. `python -m launcher.probe` is the same. Torch-free."""

from __future__ import annotations

from functools import partial

from collector_proc.simulators import ending
from launcher import probe
from launcher.parser import command_name


def main(arguments: list[str]) -> int:
    """Run the probe and end this process with the probe's exit code."""
    ending.run(partial(probe.main, arguments, prog=f"{command_name()} probe"))
