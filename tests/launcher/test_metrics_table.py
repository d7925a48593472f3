"""Metrics of a run as columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launcher.metrics_table import read_metrics
from shared.errors import SettingError


def test_each_column_has_a_value_for_every_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"gradient_steps": 1, "kl": null, "transport": "memfd"}\n'
        '{"gradient_steps": 2, "kl": 0.5, "transport": null, "loss_model": 3}\n'
        "not a row\n"
        '{"gradient_st'
    )
    found = read_metrics(str(tmp_path))
    assert list(found) == ["gradient_steps", "kl", "transport", "loss_model"]
    assert found["gradient_steps"].dtype == np.float64
    np.testing.assert_array_equal(found["gradient_steps"], [1, 2])
    np.testing.assert_array_equal(found["kl"], [np.nan, 0.5])
    np.testing.assert_array_equal(found["loss_model"], [np.nan, 3])
    assert found["transport"].tolist() == ["memfd", None]


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_run_without_rows_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SettingError, match=r"metrics\.jsonl has no row; expected the folder of a run that has trained"):
        read_metrics(tmp_path)
