"""The parser of every command line: it raises SettingError instead of printing its usage and exiting. Torch-free."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from launcher.foreign_flags import translations
from shared.errors import SettingError
from shared.words import nearest

SIMILAR = 0.7  # a flag is suggested if it is at least as similar as this


def command_name() -> str:
    """Return the command that the user typed to start this program."""
    return "tandem" if Path(sys.argv[0]).name == "tandem" else "python launch.py"


def command_parser(word: str, description: str, example: str) -> Parser:
    """Return the parser of a command. example: the arguments of an example that works, for the help."""
    return Parser(
        prog=f"{command_name()} {word}",
        description=description,
        epilog=f"example:\n  {command_name()} {word} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def path_argument(text: str) -> Path:
    """Return the path in an argument; a shell expands `~` only in front. An empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """A parser that raises SettingError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingError with the message of argparse and a fix."""
        hint = "see --help"
        if message.startswith("unrecognized arguments:"):
            flags = message.split()[2:]
            known = [option for action in self._actions for option in action.option_strings]
            similar = nearest(flags[0].split("=")[0], known, cutoff=SIMILAR)
            hint = f"write {similar[0]}" if similar else "give settings as key=value, such as env.seed=3"
            hint = "; ".join(translations(flags, command_name())) or hint
        raise SettingError(f"cannot read the command line: {message}; expected the options that --help lists; {hint}")
