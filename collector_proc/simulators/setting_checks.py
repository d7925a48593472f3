"""Checks of settings that several simulator backends share. Torch-free.

Only an import can tell which tasks a package registers. Such an import runs in a child process, because here it would
bring in torch, and because the first import of MuJoCo decides the renderer of the whole process.
"""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from shared.config import EnvSettings, Settings
from shared.errors import SettingError, together
from shared.words import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_LISTED = 8
IMAGE_RANGE = ("env.image_low", "env.image_high", "env.drop_alpha")
ENV_COUNTS = ("env.n_parallel_envs", "collector.num_collectors")
# A child that only lists tasks needs no renderer, no GPU and no banner.
LISTING = {"MUJOCO_GL": "disabled", "CUDA_VISIBLE_DEVICES": "", "MJLAB_WARP_QUIET": "1"}


def refuse_ignored(settings: Settings, ignored: Sequence[str]) -> None:
    """Refuse every setting that would have no effect, unless it has its default value.

    ignored: the dotted keys of the settings that the backend does not read.
    Raises: SettingError that lists all of them.
    """
    env, default = settings.env, Settings()
    causes = {} if env.from_pixels else dict.fromkeys(IMAGE_RANGE, "env.from_pixels=false")
    causes |= dict.fromkeys(ignored, f"env.backend={env.backend}")
    wrong = []
    for key, cause in causes.items():
        value, expected = (json.dumps(operator.attrgetter(key)(source)) for source in (settings, default))
        if value != expected:
            instead = ": env.num_envs is the number of environments" if key in ENV_COUNTS else ""
            fix = f"leave it out{instead}; where the config has it, set {key}={expected}"
            wrong.append(
                SettingError(f"{key}={value} has no effect with {cause}; expected its default, {expected}; {fix}")
            )
    if wrong:
        raise together(wrong)


def refuse_env_count(env: EnvSettings, *, one_batch: bool) -> None:
    """Raises: SettingError if env.num_envs is null with one batch of environments, or is set with worker processes."""
    if one_batch and env.num_envs is None:
        raise SettingError(
            f"env.num_envs=null with env.backend={env.backend}; expected at least 1; set env.num_envs=8 "
            f"({' and '.join(ENV_COUNTS)} are for simulators with worker processes)"
        )
    if not one_batch and env.num_envs is not None:
        raise SettingError(
            f"env.num_envs={env.num_envs} with env.backend={env.backend}, which has {' x '.join(ENV_COUNTS)} "
            "environments; expected null; set env.num_envs=null and those two"
        )


def refuse_image_range(env: EnvSettings) -> None:
    """Raises: SettingError if env.image_low is not below env.image_high."""
    if not env.image_low < env.image_high:
        raise SettingError(
            f"env.image_low={env.image_low} is not below env.image_high={env.image_high}; expected the range of float "
            "images; set env.image_low=0 env.image_high=1"
        )


def refuse_task(env: EnvSettings) -> None:
    """Raises: SettingError if env.task is set although env.name alone names the task."""
    if env.task:
        raise SettingError(
            f"env.task={env.task} has no effect with env.backend={env.backend}, where env.name alone names the task; "
            "expected an empty env.task; set env.task=''"
        )


def refuse_frame_skip(env: EnvSettings) -> None:
    """Raises: SettingError if env.frame_skip is set although the tasks repeat every action themselves."""
    if env.frame_skip != 1:
        raise SettingError(
            f"env.frame_skip={env.frame_skip} with env.backend={env.backend}, whose tasks repeat every action "
            "themselves (decimation); expected 1; set env.frame_skip=1"
        )


def refuse_images(env: EnvSettings) -> None:
    """Raises: SettingError if images are asked for although the backend has none."""
    if env.from_pixels:
        raise SettingError(
            f"env.from_pixels=true with env.backend={env.backend}, which has no images; expected false; "
            "set env.from_pixels=false"
        )


def check_installed(module: str, env: EnvSettings, fix: str) -> None:
    """Raises: SettingError if this Python has no top-level module of this name."""
    if importlib.util.find_spec(module) is None:
        raise SettingError(
            f"env.backend={env.backend} env.name={env.name} needs the module {module}, which this Python does not "
            f"have; expected it to be installed; {fix}"
        )


def unknown(problem: str, word: str, valid: Iterable[str], *, setting: str) -> SettingError:
    """Return the error for a word that is not valid. It suggests near valid words, or lists some if none is near.

    problem: the first part of the message. setting: how a word is set, with {} in its place: "env.name=gym:{}".
    """
    choices, key = sorted(valid), setting.partition("=")[0]
    near = nearest(word, choices)
    fix = f"set {setting.format(near[0])}" if near else f"set {setting.format('NAME')} with one of them"
    if not choices:
        return SettingError(f"{problem}, nor any other name; expected one that exists; change {key}")
    if len(choices) <= MAX_LISTED:
        return SettingError(f"{problem}; expected one of {', '.join(choices)}; {fix}")
    examples = ", ".join(near or choices[:MAX_LISTED])
    return SettingError(f"{problem}; expected one of {len(choices)} names, such as {examples}; {fix}")


def ask_child(
    env: EnvSettings,
    arguments: Sequence[str],
    *,
    limit_s: float,
    variables: Mapping[str, str] = LISTING,
    expected: str = "an installation that imports",
    fix: str = "reinstall what pyproject.toml pins or choose env.backend=pendulum",
) -> Any:
    """Return the JSON value that another Python process prints last. It finds the same modules as this process.

    arguments: what to run, such as ("-c", SCRIPT). variables: environment variables on top of this process's own.
    Raises: SettingError, with `expected` and `fix`, if the process fails or gives no answer within limit_s seconds.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", *arguments]  # -P: search PYTHONPATH only, not the current folder first
    environ = {**os.environ, **variables, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=limit_s, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        reason = f"it took more than {limit_s:g} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (IndexError, json.JSONDecodeError):
        reason = "its process ended without an answer"
    raise SettingError(
        f"env.name={env.name} cannot be looked up for env.backend={env.backend}: {reason}; expected {expected}; {fix}"
    )
