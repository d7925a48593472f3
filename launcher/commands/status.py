"""`python launch.py status RUN`: what a run does, while it runs and after its end. Torch-free.

Everything is read from files of the run folder, so it also works on another machine that sees the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.display import duration
from launcher.parser import command_parser, path_argument
from launcher.status_file import EVERY_S
from shared.checkpoints import damaged_checkpoints, newest_checkpoint
from shared.errors import SettingError
from shared.output import write_output
from shared.run_folder import RunFolder

DESCRIPTION = "Show what a run does: processes, pace, restarts, newest checkpoint, disk and memory left, last problem."
SILENT_S = 6 * EVERY_S  # a launch that has written nothing for so long has ended without a word


def main(arguments: list[str]) -> int:
    """Print the status and return 0. Raises: SettingError if the folder has no status."""
    parser = command_parser("status", DESCRIPTION, "runs/NAME --json")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    status = read_status_file(options.run)
    if options.json:
        write_output(json.dumps(status, indent=1) + "\n")
    else:
        write_output("".join(f"{name:<11}{text}\n" for name, text in lines(status)))
    return 0


def read_status_file(run_dir: Path, *, now: float | None = None) -> dict[str, Any]:
    """Return status.json, with what the other files of the folder show. now: seconds since 1970.

    Raises: SettingError if the folder has no status.
    """
    folder, now = RunFolder(run_dir.resolve()), time.time() if now is None else now
    try:
        content = json.loads(folder.status.read_bytes())
        age_s = now - content["updated"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{run_dir} has no status that can be read: {error}; expected the folder of a run that has started, with "
            "the file status.json; correct the folder"
        ) from error
    if content["state"] == "running" and age_s > SILENT_S:
        content["state"] = "silent"
    saved = newest_checkpoint(folder.checkpoints)
    checkpoint = None
    if saved is not None:
        saved_at = saved.manifest.saved_at or (saved.folder / "manifest.json").stat().st_mtime
        checkpoint = {"folder": str(saved.folder), "step": saved.manifest.step, "age_s": round(now - saved_at)}
    damaged = {str(path): damage for path, damage in damaged_checkpoints(folder.checkpoints)}
    facts = {"run": str(folder.path), "age_s": round(age_s, 1), "checkpoint": checkpoint, "damaged": damaged}
    return facts | content


def lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and text of each line for a reader."""
    found = [("run", status["run"]), ("state", _state(status))]
    for role, describe in (("learner", _learner), ("collector", _collector)):
        process = status.get(role)
        if process:
            where = f"{process['phase']} for {duration(process['phase_s'])}, pid {process['pid']}"
            found.append((role, ", ".join([*describe(process), where])))
    for role, causes in status["restart_causes"].items():
        number = status.get("restarts", {}).get(role, 0)
        if number:
            named = "; ".join(f"{cause} ({count})" for cause, count in causes.items())
            found.append(("restarts", f"{role}: {number}" + (f": {named}" if named else "")))
    found.append(("checkpoint", _checkpoint(status)))
    for name, space in status["resources"].items():
        left = "" if space["hours_left"] is None else f", none left in about {space['hours_left']:.1f} hours"
        total = space["total_bytes"] / 1e9
        found.append(("free", f"{space['free_bytes'] / 1e9:.1f} of {total:.1f} GB of {name}{left}"))
    problem = status["last_problem"]
    found.append(("problem", "none" if problem is None else f"{_clock(problem['time'])} {problem['text']}"))
    return found


def _state(status: Mapping[str, Any]) -> str:
    began, host = _clock(status["started"]), f"launch is pid {status['launch_pid']} on {status['host']}"
    if status["state"] == "ended":
        return f"ended at {_clock(status['updated'])} with exit code {status['exit_code']}: {status['reason']}"
    if status["state"] == "silent":
        return f"nothing was written since {_clock(status['updated'])}: launch was killed or is stopped; {host}"
    return f"running since {began} ({duration(status['updated'] - status['started'])}); {host}"


def _learner(process: Mapping[str, Any]) -> list[str]:
    if "gradient_steps" not in process:
        return []
    parts = [
        f"step {process['gradient_steps']:,}/{process['total_optim_steps']:,}",
        f"{process['updates_per_s']:.1f} updates/s",
    ]
    if process["seconds_left"] is not None:
        parts.append(f"{duration(process['seconds_left'])} left")
    names = {"return": process["episode_return_mean"], "eval": process["eval_return_mean"]}
    return parts + [f"{name} {value:.1f}" for name, value in names.items() if value is not None]


def _collector(process: Mapping[str, Any]) -> list[str]:
    if "agent_steps" not in process:
        return []
    return [f"{process['agent_steps']:,} agent steps", f"{process['agent_steps_per_s']:.0f} steps/s"]


def _checkpoint(status: Mapping[str, Any]) -> str:
    saved, damaged = status["checkpoint"], status["damaged"]
    text = "none" if saved is None else f"step {saved['step']:,}, {duration(saved['age_s'])} old"
    return text + (f"; {len(damaged)} damaged" if damaged else "")


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
