"""`python launch.py probe`: check one simulator on this machine. `python -m launcher.probe` is the same. Torch-free."""

from __future__ import annotations

from launcher import probe
from launcher.parser import command_name


def main(arguments: list[str]) -> int:
    """Run the probe and return its exit code."""
    return probe.main(arguments, prog=f"{command_name()} probe")
