"""Run launch.py with fake children: `launch_with.py LEARNER COLLECTOR [arguments of launch.py]`.

LEARNER and COLLECTOR are behaviours of child.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import launch

CHILD = Path(__file__).with_name("child.py")

if __name__ == "__main__":
    learner, collector, *arguments = sys.argv[1:]
    commands = {
        "learner": (sys.executable, str(CHILD), learner),
        "collector": (sys.executable, str(CHILD), collector),
    }
    sys.exit(launch.main(arguments, commands=commands))
