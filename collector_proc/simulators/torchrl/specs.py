"""Which entries of a torchrl environment are streamed, acted on and read as rewards and ends. Imports torch.

{"where": (n, 2), "extra": {"push": (n, 1)}, "step_count": (n, 1)}    an observation spec under a StepCounter
{"where": ("where",), "extra_push": ("extra", "push")}                what is streamed, and where it lies
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
ACCOUNT_NAMES = ("episode_reward", "is_init", "step_count", "traj_count")  # what torchrl's transforms call them


def chosen_observations(env: EnvBase, wanted: Sequence[str] | None) -> dict[str, Key]:
    """Where the streamed observations lie, by their names. The log names them and all others. wanted: env.obs_groups.

    With None, what transforms and readers of infos keep account of is left out, with a warning. Raises: SettingError.
    """
    called: dict[str, list[Key]] = {}
    for key in leaf_keys(env.observation_spec):
        called.setdefault("_".join(key).replace(".", "_"), []).append(key)
    kept = bookkeeping(env) if wanted is None else set()
    offered = {name: keys for name, keys in called.items() if not kept.issuperset(keys)}
    if not offered:
        raise SettingError(
            f"the environment observes {', '.join(called) or 'nothing'}, which is bookkeeping; wanted something to act on; "
            "set env.obs_groups to what is"
        )
    chosen = entry_names(key for name in chosen_groups(offered, wanted) for key in offered[name])
    for name, key in chosen.items():
        if isinstance(env.observation_spec[key], NonTensor | Choice):
            others = [
                other for other, keys in offered.items() if not isinstance(env.observation_spec[keys[0]], NonTensor)
            ]
            raise SettingError(
                f"observation {name!r} is no tensor but {type(env.observation_spec[key]).__name__}; wanted numbers; set "
                f"env.obs_groups=[{','.join(others)}]"
            )
    left_out = [name for name in called if name not in chosen]
    log = structlog.get_logger()
    doubtful = [name for name, key in chosen.items() if key[-1] in ACCOUNT_NAMES]
    if wanted is None and doubtful:
        log.warning(
            "observations that are called like torchrl's bookkeeping are streamed, for nothing shows what adds them; if that is "
            "what they are, set env.obs_groups to the others",
            streamed=doubtful,
            others=[name for name in chosen if name not in doubtful],
        )
    if wanted is None and left_out:
        log.warning(
            "what only keeps account of the run (infos, step counts, returns) is left out of the observations; to stream it "
            "too, name it and the others in env.obs_groups",
            streamed=list(chosen),
            left_out=left_out,
        )
    else:
        log.info("observations", streamed=list(chosen), left_out=left_out)
    return chosen


def leaf_keys(spec: Any) -> list[Key]:
    """Keys of a Composite's tensors, as tuples."""
    keys = spec.keys(include_nested=True, leaves_only=True)
    return sorted(key if isinstance(key, tuple) else (key,) for key in keys)


def action_leaf(env: EnvBase) -> tuple[Key, Any]:
    """Where the action lies and its spec. Raises: SettingError unless it is one entry of continuous numbers."""
    leaves = leaf_keys(env.full_action_spec)
    spec = env.full_action_spec[leaves[0]]
    if len(leaves) != 1 or not spec.dtype.is_floating_point or not hasattr(spec.space, "low"):
        kinds = {"_".join(key): type(env.full_action_spec[key]).__name__ for key in leaves}
        raise SettingError(
            f"the environment's actions are {kinds}; wanted one entry of continuous numbers; choose another env.name, or "
            "wrap it so that its action is one bounded vector"
        )
    return leaves[0], spec


def check_row_entries(env: EnvBase, num_rows: int) -> None:
    """Raises: SettingError unless each row has one "reward", one "done" and one "terminated"."""
    met = {"_".join(key): tuple(env.full_reward_spec[key].shape) for key in leaf_keys(env.full_reward_spec)}
    met |= {"_".join(key): tuple(env.full_done_spec[key].shape) for key in leaf_keys(env.full_done_spec)}
    wanted = ("reward", "done", "terminated")
    if any(math.prod(met.get(name, (0,))) != num_rows for name in wanted):
        raise SettingError(
            f"the environment's rewards and ends are {met}; wanted one of each of {', '.join(wanted)} per environment; "
            "environments of several agents or objectives need a transform that joins them"
        )


def refuse_missing_ends(error: RuntimeError) -> None:
    """Raises: SettingError if a step failed because the environment never says whether it terminated.

    No spec tells: torchrl adds "terminated" to one that has "done" and "truncated", and misses it in the first step.
    """
    if "Cannot infer the value of terminated" in str(error):
        raise SettingError(
            "the environment's step returns 'done' and 'truncated' without 'terminated'; wanted all that its done_spec says, "
            "for only a terminated episode ends its returns; let its done_spec and its step have 'terminated'"
        ) from error
