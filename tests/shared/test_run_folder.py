"""What run.json states."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import SettingError
from shared.run_folder import read_run


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "a"}'])
def test_a_broken_run_json_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SettingError, match=r"run\.json cannot be read.*launch\.py"):
        read_run(tmp_path)
