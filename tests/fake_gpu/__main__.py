"""Run a command that sees fake GPUs: `python -m tests.fake_gpu [--operators] COMMAND...`. See README.md."""

from __future__ import annotations

import os
import sys

from tests.fake_gpu.build import BuildError
from tests.fake_gpu.environment import check_switches, fake_gpu_environment

USAGE = "usage: python -m tests.fake_gpu [--operators] COMMAND..."


def main(arguments: list[str]) -> None:
    """Replace this process by the command."""
    operators = arguments[:1] == ["--operators"]
    command = arguments[operators:]
    if not command or command[0].startswith("-"):
        raise SystemExit(USAGE)
    try:
        check_switches(os.environ)
        os.execvpe(command[0], command, {**os.environ, **fake_gpu_environment(operators=operators)})
    except (BuildError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except FileNotFoundError as error:
        raise SystemExit(f"error: there is no program {command[0]}; expected a command; {USAGE}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
