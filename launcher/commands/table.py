"""The table of commands. A new command is a module and one row here. Torch-free.

A module has `main(arguments: list[str]) -> int`: it gets the words after the command and returns the exit code. It may
raise SettingError, which is printed, with exit code 2. No module is imported before its command is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import SettingError
from shared.words import nearest


@dataclass(frozen=True)
class Command:
    """The module of a command, and a line for the help."""

    module: str
    description: str


COMMANDS = {
    "evaluate": Command("launcher.commands.evaluate", "measure the returns of a trained policy over many episodes"),
    "export": Command("launcher.commands.export", "write a trained policy as ONNX, torch.export and safetensors"),
    "play": Command("launcher.commands.play", "film episodes of a trained policy"),
    "checkpoints": Command("launcher.commands.checkpoints", "list the checkpoints of a run with their health"),
    "settings": Command("launcher.commands.settings", "list the settings: default, type, bounds, meaning"),
    "status": Command("launcher.commands.status", "show what a run does, or how it ended"),
    "probe": Command("launcher.commands.probe", "check one simulator on this machine"),
}
# Options begin with "-", and settings have a "=" or a sign of Hydra, so none of them looks like this.
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def find_command(argv: Sequence[str]) -> Command | None:
    """Return the command that the first argument names, or None if the arguments are those of a training.

    Raises: SettingError if the first argument looks like a command and is none.
    """
    if not argv or not _WORD.fullmatch(argv[0]):
        return None
    word = argv[0]
    if word not in COMMANDS:
        similar = nearest(word, COMMANDS)
        fix = f"write {similar[0]}" if similar else "to train, leave it out, and give settings as key=value"
        raise SettingError(
            f"{word!r} is neither a command nor a setting; expected one of the commands {', '.join(COMMANDS)}, or "
            f"key=value; {fix}"
        )
    return COMMANDS[word]


def command_list() -> str:
    """Return one line for each command, for the help."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {word:{width}}  {command.description}" for word, command in COMMANDS.items())
