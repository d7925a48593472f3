"""Films of episodes: one MP4 (H.264) for each, with the return in its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import SettingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector_proc.simulators.base import Arrival
    from launcher.trained.episodes import Episode

INSTALL = "pip install -c constraints.txt -e '.[video]'"


def load_encoder() -> Any:
    """Return the package that encodes films. Raises: SettingError if it is not installed."""
    try:
        return importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise SettingError(
            f"the package imageio-ffmpeg cannot be imported: {error}; expected the extra 'video', because it encodes "
            f"the films; run: {INSTALL}"
        ) from error


class Film:
    """Films environment 0. `add` takes every arrival, `end` the episode that has just finished."""

    def __init__(self, folder: Path, name: str, *, take: Callable[[Arrival], NDArray], fps: float) -> None:
        """name: the beginning of every file's name. take: returns the picture (H, W, 3) uint8 after an arrival."""
        self._encoder, self._folder, self._name = load_encoder(), folder, name
        self._take, self._fps = take, fps
        self._partial = folder / f".partial-{name}.mp4"
        self._writer: Any = None
        self._first: NDArray | None = None  # of the next episode
        self.paths: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, arrival: Arrival) -> None:
        """Film the state after an arrival. Films of states that diverged are dropped."""
        picture = self._take(arrival)
        if arrival.diverged is not None and bool(arrival.diverged[0]):
            self.close()
        elif arrival.acting_obs is not None and bool(arrival.is_last[0]):
            self._first = picture  # the simulator has begun the next episode already
        else:
            self._write(picture)

    def end(self, episode: Episode) -> None:
        """Give the film of a finished episode its name."""
        self._finish()
        path = self._folder / f"{self._name}-episode-{len(self.paths) + 1}-return-{episode.total:.1f}.mp4"
        self._partial.rename(path)
        self.paths.append(path)
        if self._first is not None:
            self._write(self._first)
            self._first = None

    def close(self) -> None:
        """Drop the film of an episode that has not finished."""
        self._finish()
        self._partial.unlink(missing_ok=True)

    def _write(self, picture: NDArray) -> None:
        if self._writer is None:
            height, width = picture.shape[:2]
            self._writer = self._encoder.write_frames(
                str(self._partial), (width, height), fps=self._fps, codec="libx264", quality=8, macro_block_size=2
            )
            self._writer.send(None)
        self._writer.send(np.ascontiguousarray(picture))

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def observed_picture(name: str, size: int) -> Callable[[Arrival], NDArray]:
    """Return a function that shows the image that environment 0 observes, enlarged to about `size` pixels."""

    def take(arrival: Arrival) -> NDArray:
        image = arrival.obs[name][0].cpu().numpy()
        scale = max(1, size // image.shape[0])
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        return np.broadcast_to(enlarged, (*enlarged.shape[:2], 3))

    return take
