"""Print what the backend answers to the settings of several tasks, as JSON: `refusals.py JOB.json`.

JOB.json holds one list of overrides for each answer. An answer is the id of the task that was found, or the error. No
simulator starts, so one process can give all answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from collector_proc.simulators.isaaclab.task import find_and_configure
from shared.compose import compose
from shared.errors import SettingError


def main() -> None:
    answers = []
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        settings = compose("isaaclab_cartpole", overrides)
        try:
            answers.append(find_and_configure(settings, device="cpu", seed=0, generation=3)[0])
        except SettingError as error:
            answers.append(f"SettingError: {error}")
    sys.stdout.write("ANSWERS" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
