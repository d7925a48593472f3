"""Films hold one picture for each state of one episode, and are named by its return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")

import imageio_ffmpeg

from collector_proc.simulators.base import Arrival
from launcher.trained.episodes import Episode
from launcher.trained.film import Film, observed_picture

FLAGS = {"first": (True, False), "middle": (False, False), "last": (False, True), "diverged": (True, True)}


def arrival_of(kind: str, brightness: int, *, resets_inside: bool = False) -> Arrival:
    """One environment whose image has one brightness."""
    first, last = (torch.tensor([flag]) for flag in FLAGS[kind])
    obs = {"pixels": torch.full((1, 64, 64, 1), brightness, dtype=torch.uint8)}
    diverged = torch.tensor([kind == "diverged"])
    return Arrival(obs, torch.zeros(1), first, last, last, obs if resets_inside else None, diverged)


def film_in(folder: Path) -> Film:
    return Film(folder, "step-7", take=observed_picture("pixels", 128), fps=25.0)


def pictures(path: Path) -> list[int]:
    """Return the brightness of every picture of a film, in steps of 10."""
    frames = imageio_ffmpeg.read_frames(str(path))
    facts = next(frames)
    assert (facts["codec"], facts["size"], facts["fps"]) == ("h264", (128, 128), 25.0)
    return [round(float(np.frombuffer(frame, np.uint8).mean()) / 10) * 10 for frame in frames]


def episode(total: float) -> Episode:
    return Episode(total, 2, False)


def test_each_episode_is_a_film_of_its_own(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    for kind, brightness in (("first", 50), ("middle", 100), ("last", 150)):
        film.add(arrival_of(kind, brightness))
    film.end(episode(12.34))
    film.add(arrival_of("first", 200))
    film.add(arrival_of("last", 100))
    film.end(episode(-1.0))
    film.close()
    names = ["step-7-episode-1-return-12.3.mp4", "step-7-episode-2-return--1.0.mp4"]
    assert [path.name for path in film.paths] == names == sorted(path.name for path in tmp_path.iterdir())
    assert [pictures(path) for path in film.paths] == [[50, 100, 150], [200, 100]]


def test_a_picture_taken_after_a_reset_inside_the_step_begins_the_next_film(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    for kind, brightness in (("first", 50), ("middle", 100), ("last", 200)):
        film.add(arrival_of(kind, brightness, resets_inside=True))
    film.end(episode(1.0))
    film.add(arrival_of("first", 150, resets_inside=True))
    film.add(arrival_of("last", 0, resets_inside=True))
    film.end(episode(2.0))
    film.close()
    assert [pictures(path) for path in film.paths] == [[50, 100], [200, 150]]
    assert len(list(tmp_path.iterdir())) == 2, "the film of the third episode is dropped"


def test_an_episode_that_diverged_leaves_no_film(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    for kind, brightness in (("first", 50), ("middle", 100), ("diverged", 0), ("first", 150), ("last", 200)):
        film.add(arrival_of(kind, brightness))
    film.end(episode(1.0))
    assert pictures(film.paths[0]) == [150, 200]
