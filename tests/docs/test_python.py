"""The Python that docs/runs.md shows runs, with a run that is there already in place of a training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import launcher.main
from launcher.options import parse_options
from launcher.settings import compose_settings
from shared.compose import compose
from shared.run_folder import RunFolder
from shared.stream import ObsSpec, StreamSpec
from tests.docs.pages import REPO
from tests.fakes.saved_run import SMALL, save_run


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(argv: list[str]) -> int:
        options = parse_options(argv)
        assert options.run_dir is not None and compose_settings(options).env.seed == 3
        spec = StreamSpec(8, {"policy": ObsSpec((3,), "float32")}, 1)
        save_run(RunFolder(options.run_dir), compose("quickstart", SMALL), spec)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher.main, "main", train)
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPO / "docs" / "runs.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], "runs.md", "exec"), names)
    assert names["exit_code"] == 0
    action, metrics = names["action"], names["metrics"]
    assert getattr(action, "shape", None) == (2, 1)
    assert isinstance(metrics, dict) and metrics["eval_return_mean"].tolist() == [30.0, 90.0, 50.0]
