"""Choose which entries of a torchrl environment are streamed, and find its action, rewards and ends. Imports torch.

{"where": (n, 2), "extra": {"push": (n, 1)}, "step_count": (n, 1)}    an observation spec under a StepCounter
{"where": ("where",), "extra_push": ("extra", "push")}                streamed names and their keys
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import structlog
from torchrl.data import Choice, NonTensor

from collector_proc.simulators.batched.spaces import chosen_groups, entry_names
from collector_proc.simulators.torchrl.layers import bookkeeping
from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchrl.envs import EnvBase

Key = tuple[str, ...]
ACCOUNT_NAMES = ("episode_reward", "is_init", "step_count", "traj_count")  # names that torchrl's transforms use


def chosen_observations(env: EnvBase, groups: Sequence[str] | None) -> dict[str, Key]:
    """Return the name and the key of each observation to stream, and log them.

    groups: env.obs_groups. If it is None, entries that only describe the run (see `bookkeeping`) are left out with a
    warning.
    Raises: SettingError if nothing is left, or if an entry is not a tensor.
    """
    named: dict[str, list[Key]] = {}
    for key in leaf_keys(env.observation_spec):
        named.setdefault("_".join(key).replace(".", "_"), []).append(key)
    describing_run = bookkeeping(env) if groups is None else set()
    offered = {name: keys for name, keys in named.items() if not describing_run.issuperset(keys)}
    if not offered:
        raise SettingError(
            f"the environment observes {', '.join(named) or 'nothing'}, which only describes the run; expected an "
            "observation to act on; set env.obs_groups to the entries to act on"
        )
    chosen = entry_names(key for name in chosen_groups(offered, groups) for key in offered[name])
    _check_tensors(env, chosen, offered)
    _log_choice(chosen, left_out=[name for name in named if name not in chosen], by_user=groups is not None)
    return chosen


def _check_tensors(env: EnvBase, chosen: dict[str, Key], offered: dict[str, list[Key]]) -> None:
    """Raises: SettingError, with the observations that can be streamed, if a chosen one is not a tensor."""
    for name, key in chosen.items():
        if isinstance(env.observation_spec[key], NonTensor | Choice):
            others = [
                other for other, keys in offered.items() if not isinstance(env.observation_spec[keys[0]], NonTensor)
            ]
            raise SettingError(
                f"observation {name!r} is not a tensor but a {type(env.observation_spec[key]).__name__}; expected "
                f"numbers; set env.obs_groups=[{','.join(others)}]"
            )


def _log_choice(chosen: dict[str, Key], *, left_out: list[str], by_user: bool) -> None:
    """Log what is streamed. Warn where the choice may be wrong, unless the user made it."""
    log = structlog.get_logger()
    doubtful = [name for name, key in chosen.items() if key[-1] in ACCOUNT_NAMES]
    if doubtful and not by_user:
        log.warning(
            "some streamed observations have names that torchrl uses for step counts and returns; if they only "
            "describe the run, set env.obs_groups to the others",
            streamed=doubtful,
            others=[name for name in chosen if name not in doubtful],
        )
    if left_out and not by_user:
        log.warning(
            "entries that only describe the run (infos, step counts, returns) are left out of the observations; to "
            "stream them too, list them together with the others in env.obs_groups",
            streamed=list(chosen),
            left_out=left_out,
        )
    else:
        log.info("observations", streamed=list(chosen), left_out=left_out)


def leaf_keys(spec: Any) -> list[Key]:
    """Return the keys of a Composite's tensors as sorted tuples."""
    keys = spec.keys(include_nested=True, leaves_only=True)
    return sorted(key if isinstance(key, tuple) else (key,) for key in keys)


def action_leaf(env: EnvBase) -> tuple[Key, Any]:
    """Return the key and the spec of the action. Raises: SettingError unless it is one entry of continuous numbers."""
    leaves = leaf_keys(env.full_action_spec)
    spec = env.full_action_spec[leaves[0]]
    if len(leaves) != 1 or not spec.dtype.is_floating_point or not hasattr(spec.space, "low"):
        kinds = {"_".join(key): type(env.full_action_spec[key]).__name__ for key in leaves}
        raise SettingError(
            f"the environment's actions are {kinds}; expected one entry of continuous numbers; choose another "
            "env.name, or wrap it so that its action is one bounded vector"
        )
    return leaves[0], spec


def check_row_entries(env: EnvBase, num_rows: int) -> None:
    """Check that each row has one "reward", one "done" and one "terminated". Raises: SettingError if not."""
    found = {"_".join(key): tuple(env.full_reward_spec[key].shape) for key in leaf_keys(env.full_reward_spec)}
    found |= {"_".join(key): tuple(env.full_done_spec[key].shape) for key in leaf_keys(env.full_done_spec)}
    expected = ("reward", "done", "terminated")
    if any(math.prod(found.get(name, (0,))) != num_rows for name in expected):
        raise SettingError(
            f"the environment's rewards and ends are {found}; expected one of each of {', '.join(expected)} per "
            "environment; for several agents or objectives, add a transform that joins them"
        )


def refuse_missing_ends(error: RuntimeError) -> None:
    """Explain a step that failed because the environment returns no "terminated".

    The spec does not show this: torchrl adds "terminated" to a spec that has "done" and "truncated", and fails only in
    the first step. Raises: SettingError if this is the cause of `error`.
    """
    if "Cannot infer the value of terminated" in str(error):
        raise SettingError(
            "the environment's step returns 'done' and 'truncated' without 'terminated'; expected 'terminated' too, "
            "because returns end only where an episode terminated; add 'terminated' to its done_spec and to its step"
        ) from error
