"""Which torchrl, mjlab and isaaclab environments can be asked for, told without importing either. Torch-free.

What only an import can tell (which tasks are registered) is asked of a child process with a deadline: an import here
would bring torch in, and would fix this process's renderer for good.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from collector_proc.simulators.sources import find_module, names_of
from shared.config import CollectorSettings, EnvSettings
from shared.errors import SettingError, together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shared.config import Settings

LIST_GYM = "import json, gymnasium; print(json.dumps(sorted(gymnasium.registry)))"
LIST_MJLAB = "import json, mjlab.tasks; from mjlab.tasks.registry import list_tasks; print(json.dumps(list_tasks()))"
LIST_GYM_S, LIST_MJLAB_S = 60.0, 180.0
SPACES = ("action_scale", "obs_groups", "image_low", "image_high")
IDLE = {  # settings of env that a backend does not read
    "dm_control": (*SPACES, "reward_per_second", "randomize_start"),
    "pendulum": (*SPACES, "reward_per_second", "randomize_start", "n_parallel_envs"),
    "torchrl": ("randomize_start", "n_parallel_envs"),
    "mjlab": ("n_parallel_envs",),
    "isaaclab": ("n_parallel_envs",),
}


@dataclass(frozen=True)
class TorchrlWrapper:
    """A class of torchrl.envs, the module it needs, and whether one object steps all environments."""

    cls: str
    module: str
    batched: bool = False


TORCHRL_WRAPPERS = {
    "gym": TorchrlWrapper("GymEnv", "gymnasium"),
    "dm_control": TorchrlWrapper("DMControlEnv", "dm_control"),
    "safety_gymnasium": TorchrlWrapper("SafetyGymnasiumEnv", "safety_gymnasium"),
    "brax": TorchrlWrapper("BraxEnv", "brax", batched=True),
    "mujoco_playground": TorchrlWrapper("MujocoPlaygroundEnv", "mujoco_playground", batched=True),
}


def refuse_idle(settings: Settings) -> None:
    """Refuse values that would silently do nothing. Raises: SettingError that names all of them."""
    env = settings.env
    backend, images = f"env.backend={env.backend}", "env.from_pixels=false"
    idle: list[tuple[str, str, Any, Any]] = [(f"env.{name}", backend, env, EnvSettings()) for name in IDLE[env.backend]]
    if not env.from_pixels:
        told = IDLE[env.backend]
        idle += [
            (f"env.{name}", images, env, EnvSettings()) for name in ("image_low", "image_high") if name not in told
        ]
    if env.backend != "dm_control":
        idle.append(("collector.num_collectors", backend, settings.collector, CollectorSettings()))
    wrong = []
    for key, cause, met, default in idle:
        name = key.split(".")[1]
        value, wanted = getattr(met, name), getattr(default, name)
        if value != wanted:
            value, wanted = json.dumps(value), json.dumps(wanted)
            mend = f"leave it out{_own_count(key, env)}; where the config has it, set {key}={wanted}"
            wrong.append(SettingError(f"{key}={value} does nothing with {cause}; wanted its default, {wanted}; {mend}"))
    if wrong:
        raise together(wrong)


def _own_count(key: str, env: EnvSettings) -> str:
    """What stands in for the settings that count dm_control's environments."""
    counts = key in ("collector.num_collectors", "env.n_parallel_envs")
    return f": the number of environments is env.num_envs={json.dumps(env.num_envs)}" if counts else ""


def check_torchrl(env: EnvSettings, suite_tasks: Iterable[tuple[str, str]]) -> None:
    """Raises: SettingError if env.name names no environment of torchrl, or settings that do not apply are set."""
    prefix, _, name = env.name.partition(":")
    if not name:
        raise SettingError(
            f"env.name={env.name} says no wrapper: env.backend=torchrl wanted PREFIX:ID with one of "
            f"{', '.join(TORCHRL_WRAPPERS)}, or package.module:callable; set env.name=gym:Pendulum-v1"
        )
    _refuse_other_settings(env)
    if env.reward_per_second:
        raise SettingError(
            "env.reward_per_second=true with env.backend=torchrl, which knows no seconds; wanted false; set "
            "env.reward_per_second=false and optimization.reward_scale instead"
        )
    wrapper = TORCHRL_WRAPPERS.get(prefix)
    if wrapper is None:
        _check_importable(prefix.partition(".")[0], env, f"put the folder of {prefix} on PYTHONPATH, or install it")
        _check_factory(prefix, name)
        return
    _check_importable(wrapper.module, env, f"pip install {wrapper.module}")
    if prefix == "gym" and ":" not in name:  # module:id is registered when gymnasium imports the module
        _check_known(name, ask_child(LIST_GYM, env, LIST_GYM_S), "gym:")
    if prefix == "dm_control":
        _check_known(name, [f"{domain}/{task}" for domain, task in suite_tasks], "dm_control:")


def check_mjlab(env: EnvSettings, say: Callable[[str], None]) -> None:
    """Raises: SettingError if mjlab is missing, env.name is no task of it, or settings that do not apply are set."""
    _check_importable("mjlab", env, "pip install mjlab==1.6.0")
    _refuse_other_settings(env)
    if env.frame_skip != 1:
        raise SettingError(
            f"env.frame_skip={env.frame_skip} with env.backend=mjlab: its tasks repeat every action themselves "
            "(decimation); wanted 1; set env.frame_skip=1"
        )
    say("looking up mjlab's tasks: this imports mjlab once, which can take half a minute")
    _check_known(env.name, ask_child(LIST_MJLAB, env, LIST_MJLAB_S))


def check_isaaclab(env: EnvSettings) -> None:
    """Raises: SettingError if Isaac Lab is missing, or settings that do not apply are set. Its tasks are known after launch."""
    met = "{}.{}".format(*sys.version_info)
    mend = f"Isaac Lab 2.3.2 needs Python 3.11 (this is {met}) and Isaac Sim 5.1: see its installation guide"
    for module in ("isaaclab", "gymnasium"):
        _check_importable(module, env, mend)
    _refuse_isaac_lab_3()
    _refuse_other_settings(env)
    if env.frame_skip != 1:
        raise SettingError(
            f"env.frame_skip={env.frame_skip} with env.backend=isaaclab: its tasks repeat every action themselves "
            "(decimation); wanted 1; set env.frame_skip=1"
        )


def ask_child(script: str, env: EnvSettings, limit_s: float) -> list[str]:
    """The JSON list that `script` prints last, run by this Python in a process of its own.

    Raises: SettingError if it fails or takes longer than limit_s.
    """
    variables = {**os.environ, "MUJOCO_GL": "disabled", "CUDA_VISIBLE_DEVICES": "", "MJLAB_WARP_QUIET": "1"}
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit_s, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        stderr = error.stderr.decode() if isinstance(error.stderr, bytes) else error.stderr
        last_words = (stderr or str(error)).strip().splitlines()[-1]
        raise SettingError(
            f"env.backend={env.backend} cannot list its tasks: {last_words}; wanted an installation that imports; "
            "reinstall what pyproject.toml pins or choose env.backend=pendulum"
        ) from error
    return json.loads(done.stdout.splitlines()[-1])


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid words, the nearest to `word` first, at most eight."""
    ordered = sorted(valid, key=lambda candidate: -difflib.SequenceMatcher(None, word, candidate).ratio())
    return ", ".join(ordered[:8])


def _check_importable(module: str, env: EnvSettings, mend: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SettingError(
            f"env.backend={env.backend} env.name={env.name} needs the module {module}, which this Python does not have; "
            f"wanted it installed; {mend}"
        )


def _check_factory(module: str, name: str) -> None:
    """Refuse a submodule or a name that the sources rule out; what only an import can tell passes."""
    spec = find_module(module)
    if spec is not None:
        names = names_of(spec)
        if names is not None and name not in names.bound:
            _refuse_factory(f"{module}:{name}", spec.origin or module, name, names.defined, f"{module}:")
        return
    parent, _, last = module.rpartition(".")
    above = find_module(parent)
    if above is not None and names_of(above) is not None:
        folders = list(above.submodule_search_locations or ())
        known = [found.name for found in pkgutil.iter_modules(folders)]
        _refuse_factory(f"{module}:{name}", f"the package {parent}", last, known, f"{parent}.", f":{name}")


def _refuse_factory(met: str, place: str, part: str, known: Iterable[str], before: str, after: str = "") -> NoReturn:
    valid = sorted(known)
    wanted = f"one of {nearest(part, valid)}" if valid else f"a {part} in it"
    mend = f"set env.name={before}{nearest(part, valid).split(',')[0]}{after}" if valid else f"add {part} there"
    raise SettingError(f"env.name={met} does not exist: {place} has no {part}; wanted {wanted}; {mend}")


def _refuse_isaac_lab_3() -> None:
    """Told by a file of its task package, which is not imported: that would import torch."""
    spec = importlib.util.find_spec("isaaclab_tasks")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "utils" / "sim_launcher.py").exists():
            raise SettingError(
                f"env.backend=isaaclab met Isaac Lab 3 in {folder}, whose start this backend has never been run with; wanted "
                "Isaac Lab 2.3; install isaaclab 2.3.2 with Isaac Sim 5.1 in an environment of its own"
            )


def _check_known(name: str, known: list[str], prefix: str = "") -> None:
    if name not in known:
        raise SettingError(
            f"env.name={prefix}{name} is not registered; wanted one of {nearest(name, known)}; "
            f"set env.name={prefix}{nearest(name, known).split(',')[0]}"
        )


def _refuse_other_settings(env: EnvSettings) -> None:
    """Settings of other backends, which would silently do nothing, and a range of images that is none."""
    if not env.image_low < env.image_high:
        raise SettingError(
            f"env.image_low={env.image_low} is not below env.image_high={env.image_high}; wanted the range of float "
            "images; set env.image_low=0 env.image_high=1"
        )
    if env.num_envs is None:
        raise SettingError(
            f"env.num_envs=null with env.backend={env.backend}; wanted at least 1; set env.num_envs=8 "
            "(env.n_parallel_envs and collector.num_collectors are for dm_control)"
        )
    if env.task:
        raise SettingError(
            f"env.task={env.task} with env.backend={env.backend}, which says all in env.name; wanted none; set env.task=''"
        )
