"""Start a run: `python launch.py`, or `tandem` where the project is installed. `--help` lists the options."""

from __future__ import annotations

import sys

from launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
