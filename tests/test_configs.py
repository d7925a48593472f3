"""Every file of configs/ can be composed, and its sizes fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.compose import compose
from shared.geometry import check_settings

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_composes_and_its_sizes_fit(name: str) -> None:
    settings = compose(name, [])
    check_settings(settings)
