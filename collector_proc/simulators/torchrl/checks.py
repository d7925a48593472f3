"""Checks of the settings of the backend `torchrl`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from collector_proc.simulators.dm_control.checks import suite_tasks
from collector_proc.simulators.setting_checks import ask_child, check_installed, refuse_task, unknown
from collector_proc.simulators.torchrl.user_module import Findings
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import Settings

LIST_GYM = "import json, gymnasium; print(json.dumps(sorted(gymnasium.registry)))"
LIST_GYM_S = 60.0
INSPECT = "collector_proc.simulators.torchrl.user_module"


@dataclass(frozen=True)
class Wrapper:
    """A class of torchrl.envs, the module it needs, and whether one object steps all environments."""

    cls: str
    module: str
    batched: bool = False


WRAPPERS = {
    "gym": Wrapper("GymEnv", "gymnasium"),
    "dm_control": Wrapper("DMControlEnv", "dm_control"),
    "safety_gymnasium": Wrapper("SafetyGymnasiumEnv", "safety_gymnasium"),
    "brax": Wrapper("BraxEnv", "brax", batched=True),
    "mujoco_playground": Wrapper("MujocoPlaygroundEnv", "mujoco_playground", batched=True),
}


def check(settings: Settings, report: Callable[[str], None]) -> None:
    """Raises: SettingError if env.name names no environment that torchrl can make, or a setting has no effect."""
    env = settings.env
    prefix, _, name = env.name.partition(":")
    if not name or prefix.partition(".")[0] in ("", "__main__"):
        raise SettingError(
            f"env.name={env.name} names no wrapper of torchrl; expected PREFIX:ID with one of {', '.join(WRAPPERS)} as "
            "PREFIX, or package.module:callable; set env.name=gym:ID for an environment of gymnasium"
        )
    refuse_task(env)
    if env.reward_per_second:
        raise SettingError(
            "env.reward_per_second=true with env.backend=torchrl, whose environments have no step duration; expected "
            "false; set env.reward_per_second=false, and optimization.reward_scale instead"
        )
    wrapper = WRAPPERS.get(prefix)
    if wrapper is None:
        _check_callable(settings, prefix, name, report)
        return
    check_installed(wrapper.module, env, f"pip install {wrapper.module}")
    known: list[str] | None = None
    if prefix == "gym" and ":" not in name:  # gymnasium imports MODULE of MODULE:ID itself, which registers ID
        known = ask_child(env, ("-c", LIST_GYM), limit_s=LIST_GYM_S)
    if prefix == "dm_control":
        known = [f"{domain}/{task}" for domain, task in suite_tasks(env)]
    if known is not None and name not in known:
        raise unknown(f"env.name={env.name} is not registered", name, known, setting=f"env.name={prefix}:{{}}")


def _check_callable(settings: Settings, module: str, name: str, report: Callable[[str], None]) -> None:
    """Import the user's module in a child process. Raises: SettingError if it fails or has no such callable."""
    env, limit_s = settings.env, settings.deadlines.start_s
    check_installed(module.partition(".")[0], env, f"put the folder of {module} on PYTHONPATH, or install it")
    report(f"importing {module} in a process of its own, to look up env.name={env.name}")
    answer = ask_child(
        env,
        ("-m", INSPECT, module, name),
        limit_s=limit_s,
        variables={},
        expected=f"a module that imports within deadlines.start_s={limit_s:g}",
        fix=f"correct {module}, or raise deadlines.start_s",
    )
    found = Findings(**answer)
    if found.error:
        raise SettingError(
            f"env.name={env.name} does not import: {found.error} ({found.place}); expected a module that imports; "
            "correct it there"
        )
    if found.missing:
        package, _, last = found.missing.rpartition(".")
        below = module.removeprefix(found.missing)
        problem = f"env.name={env.name} does not exist: {package} has no module {last}"
        raise unknown(problem, last, found.names, setting=f"env.name={package}.{{}}{below}:{name}")
    if not found.kind:
        problem = f"env.name={env.name} does not exist: {found.place} has no {name}"
        raise unknown(problem, name, found.names, setting=f"env.name={module}:{{}}")
    if not found.callable:
        raise SettingError(
            f"env.name={env.name} is of type {found.kind}; expected a function or a class that makes an environment; "
            f"set env.name={module}:NAME with the name of one"
        )
