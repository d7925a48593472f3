"""The metrics of a run as columns, for notebooks and scripts. Torch-free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import SettingError
from shared.metrics import parse_row
from shared.run_folder import RunFolder


def read_metrics(run_dir: Path | str) -> dict[str, NDArray]:
    """Return the columns of a run's metrics.jsonl by their names; each has one value for every row.

    Numbers are float64, with NaN where a row has none; columns with text hold Python objects. pandas.DataFrame takes
    the result as it is. A last line that the run has not finished writing is left out.
    Raises: SettingError if the run has no metrics.
    """
    path = RunFolder(Path(run_dir).expanduser()).metrics
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [row for row in map(parse_row, lines) if row is not None]
    if not rows:
        raise SettingError(
            f"{path} has no row; expected the folder of a run that has trained for optimization.log_every steps; "
            "correct the path, or wait"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _column(values: list[object]) -> NDArray:
    """Return one value for every row: numbers if there is nothing else than numbers and null."""
    if all(value is None or isinstance(value, bool | int | float) for value in values):
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array(values, dtype=object)
