"""`python launch.py checkpoints RUN`: list the checkpoints of a run with their health. Torch-free.

Nothing in the run folder is changed, so a run that is active is not disturbed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.display import duration
from launcher.parser import command_parser, path_argument
from shared.checkpoints import DamagedError, checkpoint_folders, damage, read_manifest, size_damage
from shared.errors import SettingError
from shared.output import write_output
from shared.run_folder import RunFolder

DESCRIPTION = "List the checkpoints of a run: step, age, size, evaluation return, and whether every checksum is right."
WHOLE = "whole"


@dataclass(frozen=True)
class Row:
    """One checkpoint as it is listed. None: the manifest cannot be read, or there is no such number.

    num_bytes: of all its files; segments of the replay that it shares with other checkpoints are counted in each.
    """

    folder: str
    health: str
    step: int | None = None
    serial: int | None = None
    saved_at: float | None = None
    age_s: float | None = None
    num_bytes: int | None = None
    replay_rows: int | None = None
    eval_return_mean: float | None = None

    def cells(self) -> list[str]:
        """Return the row for a reader."""
        return [
            Path(self.folder).name if self.step is None else f"{self.step:,}",
            "?" if not self.saved_at or self.age_s is None else f"{duration(self.age_s)} ago",
            "?" if self.num_bytes is None else f"{self.num_bytes / 1e6:,.1f} MB",
            "-" if not self.replay_rows else f"{self.replay_rows:,}",
            "-" if self.eval_return_mean is None else f"{self.eval_return_mean:.4g}",
            self.health,
        ]


def main(arguments: list[str]) -> int:
    """Print the checkpoints of a run, the newest first, and return 0. Raises: SettingError if it is no run folder."""
    parser = command_parser("checkpoints", DESCRIPTION, "runs/NAME")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="the folder of a run")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--sizes", action="store_true", help="compare only the sizes of the files, which is fast")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    if not folder.config.is_file():
        raise SettingError(
            f"{folder.path} is not a run folder: it has no config.yaml; expected a folder such as runs/NAME; "
            "correct the path"
        )
    rows = list_checkpoints(folder.checkpoints, sizes_only=options.sizes, now=time.time())
    write_output(json.dumps([asdict(row) for row in rows], indent=1) + "\n" if options.json else _table(rows))
    return 0


def list_checkpoints(root: Path, *, sizes_only: bool, now: float) -> list[Row]:
    """Return a row for each checkpoint, the newest first. now: seconds since 1970."""
    known: dict[tuple[int, int], str] = {}  # so that a segment that several checkpoints share is read once
    rows = []
    for folder in checkpoint_folders(root):
        found = size_damage(folder) if sizes_only else damage(folder, known=known)
        if folder.is_dir():  # an active run may have deleted it meanwhile
            rows.append(_row(folder, found, now))
    return sorted(rows, key=lambda row: (row.serial or 0, row.step or 0), reverse=True)


def _row(folder: Path, found: str | None, now: float) -> Row:
    """Return the row of a checkpoint. found: what is wrong with it, or None."""
    health = WHOLE if found is None else f"damaged: {found}"
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return Row(str(folder), f"unusable: {error}")
    return Row(
        folder=str(folder),
        health=health if manifest.format > 1 else f"{health}, without checksums (of Tandem 0.1)",
        step=manifest.step,
        serial=manifest.serial,
        saved_at=manifest.saved_at,
        age_s=max(0.0, now - manifest.saved_at),
        num_bytes=manifest.num_bytes,
        replay_rows=manifest.replay_rows,
        eval_return_mean=manifest.eval_return_mean,
    )


def _table(rows: list[Row]) -> str:
    """Return the rows as text, in columns."""
    if not rows:
        return "no checkpoint yet\n"
    lines = [["step", "saved", "size", "replay rows", "eval return", "health"], *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(text.rstrip() + "\n" for text in texts)
