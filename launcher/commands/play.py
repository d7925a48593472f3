"""`python launch.py play RUN`: films of episodes of the frozen policy. Torch-free at import."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector_proc.simulators.registry import BACKENDS, find_backend
from launcher.devices import choose_torch_device
from launcher.parser import command_parser, path_argument
from launcher.trained_run import SEED_OFFSET, check_stream, open_trained_run, running_simulator
from shared.errors import SettingError, SimulatorError
from shared.lifetime import ExitCode
from shared.output import write_error, write_output

if TYPE_CHECKING:
    from collector_proc.simulators.base import Simulator
    from launcher.trained.film import Film
    from launcher.trained_run import TrainedRun

DESCRIPTION = """\
Film episodes of a trained policy without exploration noise. Each episode becomes an MP4 (H.264) in RUN/videos, whose
name holds the step of the checkpoint and the return. Time in the film runs as in the simulator, at one picture per
agent step.
"""
DEFAULT_FPS = 20.0  # where the backend does not tell the duration of an agent step


def main(arguments: list[str]) -> int:
    """Film the episodes and return the exit code.

    Raises: SettingError if the run, a package or a setting is missing, or if there is nothing to film.
    """
    options = _parse(arguments)
    run = open_trained_run(options.run, options.checkpoint, options.overrides)
    run.use_environments(1)
    camera = _camera_module(run)
    if camera is not None:
        camera.prepare()
    seed = run.settings.env.seed + SEED_OFFSET if options.seed is None else options.seed
    device = choose_torch_device(options.device)
    try:
        with running_simulator(run.settings, seed=seed, device=device) as simulator:
            paths = _film(simulator, run, options, camera, seed=seed, device=device)
    except SimulatorError as error:
        write_error(f"error: {error}\n")
        return ExitCode.FAILED
    write_output("".join(f"{path}\n" for path in paths))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("play", DESCRIPTION, "runs/NAME --episodes 2")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="folder of a run")
    parser.add_argument("--checkpoint", metavar="STEP", default="latest", help="STEP, best or latest (default: latest)")
    parser.add_argument("--episodes", metavar="N", type=int, default=1, help="number of films (default: 1)")
    parser.add_argument(
        "--seed", metavar="N", type=int, help=f"seed of the episodes (default: env.seed + {SEED_OFFSET})"
    )
    parser.add_argument("--size", metavar="PIXELS", type=int, default=480, help="width and height (default: 480)")
    parser.add_argument("--fps", metavar="N", type=float, help="pictures per second (default: as in the simulator)")
    parser.add_argument("--out", metavar="DIR", type=path_argument, help="folder of the films (default: RUN/videos)")
    parser.add_argument("--device", help="cpu or cuda:0 (default: cuda:0 if there is a GPU)")
    parser.add_argument("overrides", metavar="env.KEY=VALUE", nargs="*", help="settings of the environment")
    options = parser.parse_intermixed_args(arguments)
    limits = {"--episodes": (options.episodes, 1, 1000), "--size": (options.size, 64, 4096)}
    for flag, (value, lowest, highest) in limits.items():
        if not lowest <= value <= highest:
            raise SettingError(f"{flag} {value} is out of bounds; expected {lowest} to {highest}; correct it")
    if options.fps is not None and not 0.1 <= options.fps <= 1000:
        raise SettingError(f"--fps {options.fps} is out of bounds; expected 0.1 to 1000; correct it, or leave it out")
    if options.size % 2:
        raise SettingError(f"--size {options.size} is odd; expected an even number, as H.264 needs it; correct it")
    if options.checkpoint == "all":
        raise SettingError("--checkpoint all names several; expected one; write a step, best or latest")
    return options


def _camera_module(run: TrainedRun) -> Any | None:
    """Return the module that renders the run's backend, or None if the observed images are filmed instead.

    Raises: SettingError if there is nothing to film.
    """
    env = run.settings.env
    if _renders(env.backend):
        return importlib.import_module(f"{find_backend(env.backend).package}.camera")
    if env.from_pixels:
        return None
    able = ", ".join(name for name in BACKENDS if _renders(name))
    raise SettingError(
        f"env.backend={env.backend} with env.from_pixels=false shows no pictures to film; expected one of the backends "
        f"{able}, or a run that observes images; use evaluate for its returns, or the simulator's own viewer with the "
        "files of export"
    )


def _renders(backend: str) -> bool:
    return importlib.util.find_spec(f"{find_backend(backend).package}.camera") is not None


def _film(
    simulator: Simulator, run: TrainedRun, options: argparse.Namespace, camera: Any | None, *, seed: int, device: str
) -> list[Path]:
    """Play the episodes and return the films. This imports torch."""
    import torch

    from launcher.trained.episodes import play_episodes
    from launcher.trained.film import load_encoder
    from launcher.trained.policy import read_policy

    load_encoder()
    acting_device = simulator.device if simulator.device.startswith("cuda") else device
    trained = read_policy(run.checkpoints[0], run.settings, device=acting_device)
    check_stream(simulator, trained.spec)
    film = _open_film(simulator, run, options, camera, name=f"step-{trained.step}")
    torch.manual_seed(seed)
    try:
        play_episodes(simulator, trained, options.episodes, rows=1, on_arrival=film.add, on_episode=film.end)
    finally:
        film.close()
    return film.paths


def _open_film(
    simulator: Simulator, run: TrainedRun, options: argparse.Namespace, camera: Any | None, *, name: str
) -> Film:
    """Return a film that shows what the backend renders, or the image that the policy observes."""
    from launcher.trained.film import Film, observed_picture

    folder = (options.out or run.folder.path / "videos").expanduser().resolve()
    if camera is not None:
        view = camera.Camera(simulator, options.size)
        return Film(folder, name, take=lambda arrival: view.frame(), fps=options.fps or 1 / view.step_s)
    image = next(entry for entry, spec in sorted(simulator.spec.obs.items()) if spec.is_image)
    return Film(folder, name, take=observed_picture(image, options.size), fps=options.fps or DEFAULT_FPS)
