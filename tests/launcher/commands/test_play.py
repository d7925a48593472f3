"""The command `play`: films of the episodes that `evaluate` counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from shared.compose import compose
from shared.run_folder import RunFolder
from shared.stream import ObsSpec, StreamSpec
from tests.fakes.saved_run import SMALL, save_run

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def video() -> None:
    pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")


def test_a_film_shows_every_state_in_the_simulators_time_and_has_the_return_in_its_name(
    video: None, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import imageio_ffmpeg

    assert launch.main(["play", "runs/NAME", "--seed", "3", "--size", "128"]) == 0
    (film,) = (run_dir / "videos").iterdir()
    assert capsys.readouterr().out == f"{film}\n"
    frames = imageio_ffmpeg.read_frames(str(film))
    facts = next(frames)
    assert (facts["codec"], facts["size"], facts["fps"]) == ("h264", (128, 128), 10.0)
    assert len(list(frames)) == 21, "the first state, and that after each of 20 agent steps"
    assert launch.main(["evaluate", "runs/NAME", "--seed", "3", "--episodes", "1"]) == 0
    mean = float(capsys.readouterr().out.splitlines()[1].split()[2])
    assert film.name.startswith("step-20-episode-1-return-")
    assert float(film.stem.rpartition("return-")[2]) == pytest.approx(mean, abs=0.06)


def test_a_task_that_is_observed_as_a_state_is_rendered(
    video: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: dm_control chooses its renderer when it is imported."""
    import imageio_ffmpeg
    import numpy as np

    code = "from dm_control import suite; suite.load('cartpole', 'swingup').physics.render(64, 64)"
    environ = {**os.environ, "MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": ""}
    if subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, timeout=120).returncode:
        pytest.skip("no EGL here")
    del environ["MUJOCO_GL"]
    changes = ["env.name=cartpole", "env.task=swingup", "env.from_pixels=false", "env.horizon=3"]
    run = RunFolder(tmp_path / "run")
    save_run(run, compose("dm_control", [*SMALL, *changes]), StreamSpec(1, {"policy": ObsSpec((5,), "float32")}, 1))
    command = [sys.executable, str(REPO / "launch.py"), "play", str(run.path), "--size", "64"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    frames = imageio_ffmpeg.read_frames(done.stdout.strip())
    next(frames)
    pictures = [np.frombuffer(frame, np.uint8) for frame in frames]
    assert len(pictures) == 4 and all(len(np.unique(picture)) > 20 for picture in pictures), "pictures of something"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["env.backend=torchrl", "env.name=gym:Pendulum-v1"],
            "env.backend=torchrl with env.from_pixels=false shows no",
        ),
        (
            ["env.backend=torchrl", "env.name=gym:Pendulum-v1"],
            "expected one of the backends dm_control, pendulum, mjlab",
        ),
        (["--size", "63"], "--size 63 is out of bounds; expected 64 to 4096"),
        (["--size", "65"], "--size 65 is odd"),
        (["--episodes", "0"], "--episodes 0 is out of bounds"),
        (["--fps", "0"], "--fps 0.0 is out of bounds"),
        (["--checkpoint", "all"], "--checkpoint all names several"),
    ],
)
def test_what_cannot_be_filmed_is_refused(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["play", "runs/NAME", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "videos").exists()


def test_a_missing_encoder_is_named_with_the_extra_that_has_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert launch.main(["play", "runs/NAME"]) == 2
    assert "-e '.[video]'" in capsys.readouterr().err
