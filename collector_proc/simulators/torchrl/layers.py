"""What a torchrl environment is built of: wrappers, transforms, and which of them begin episodes by themselves. Imports torch.

EnvBase(auto_reset=True), AutoResetTransform     the last observation becomes NaN, or the next episode's first
native_autoreset=True                            the last observation is the next episode's first
gymnasium vector, NEXT_STEP (GymEnv's own)       the last observation is zeros, the first that of the old episode
gymnasium vector, SAME_STEP                      true observations; only rows that are done can be reset
gymnasium vector, DISABLED                       true observations; any row can be reset
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchrl.envs import (
    AutoResetEnv,
    AutoResetTransform,
    Compose,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TargetReturn,
    Timer,
    TrajCounter,
    TransformedEnv,
    VecGymEnvTransform,
)
from torchrl.envs.batched_envs import BatchedEnvBase

from shared.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchrl.envs import EnvBase, Transform

ACCOUNTS = (InitTracker, RewardSum, StepCounter, TargetReturn, Timer, TrajCounter)  # what these add is no observation
MAKE_VECTOR = (
    "make it as torchrl.envs.GymWrapper(gymnasium.make_vec(ID, num_envs=N, "
    "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.DISABLED}))"
)


def layers_of(env: EnvBase) -> Iterator[EnvBase]:
    """The environment and every one it transforms, outermost first."""
    yield env
    while isinstance(env, TransformedEnv):
        env = env.base_env
        yield env


def transforms_of(env: EnvBase) -> list[Transform]:
    """Its transforms, in the order in which a step goes through them."""
    inner_first = reversed([layer for layer in layers_of(env) if isinstance(layer, TransformedEnv)])
    return [transform for layer in inner_first for transform in _single(layer.transform)]


def refuse_own_resets(env: EnvBase) -> None:
    """Raises: SettingError if the environment resets itself in a way that loses how its episodes ended."""
    found = _own_reset(env)
    if found is not None:
        what, mend = found
        raise SettingError(
            f"the environment resets itself ({what}), which overwrites the last observation of every episode; wanted one "
            f"that waits for reset(); {mend}"
        )


def bookkeeping(env: EnvBase) -> set[tuple[str, ...]]:
    """Where entries of its observation spec lie that keep account of the run: infos that a reader copies, what the
    transforms of ACCOUNTS add, and what torchrl's others add that read nothing but such entries, rewards and ends. Of a
    batch, what its workers keep too, if one can be looked at.
    """
    *_, base = layers_of(env)
    found = {key for reader in vars(base).get("_info_dict_reader", ()) for key in _keys(reader.info_spec)}
    with _worker(base) as worker:
        found |= set() if worker is None else bookkeeping(worker)
    known = found | _keys(base.full_reward_spec) | _keys(base.full_done_spec)
    spec: Any = base.output_spec
    for transform in transforms_of(env):
        before, spec = spec, transform.transform_output_spec(spec.clone())
        after = _keys(spec["full_observation_spec"])
        # one may write what has been there, as a RewardSum around workers that sum too
        added = after - _keys(before["full_observation_spec"]) | after & _keys(transform.out_keys)
        read = _keys(transform.in_keys)
        # a user's own may mean as an observation what it makes of a reward
        of_torchrl = type(transform).__module__.startswith("torchrl.")
        if isinstance(transform, ACCOUNTS) or (of_torchrl and read and read <= known):
            found, known = found | added, known | added
    return found


@contextmanager
def _worker(batch: EnvBase) -> Iterator[EnvBase | None]:
    """An environment as this batch's workers have it: a SerialEnv's own, or one more, closed in the end. None where there
    is none to be had: it cannot be made here, or is not to be, or the environment has no workers.
    """
    own = vars(batch).get("_envs")  # once it has started
    elsewhere = vars(batch).get("_metadata_from_workers", False)  # a user's wish: none is made in this process
    if not isinstance(batch, BatchedEnvBase) or own or elsewhere:
        yield own[0] if isinstance(batch, SerialEnv) and own else None
        return
    try:
        made = batch.create_env_fn[0](**batch.create_env_kwargs[0])
    except Exception:  # each user's own function fails in its own ways; what is streamed then, is warned of
        yield None
        return
    try:
        yield made
    finally:
        if not made.is_closed:
            made.close()


def _keys(spec: Any) -> set[tuple[str, ...]]:
    keys = spec.keys(True, True) if hasattr(spec, "items") and hasattr(spec, "shape") else (spec or ())
    return {key if isinstance(key, tuple) else (key,) for key in keys}


def resets_any_row(env: EnvBase) -> bool:
    """Whether rows can be reset that are not done. gymnasium's vectors in SAME_STEP mode have their own idea of who is."""
    return not any(isinstance(transform, VecGymEnvTransform) for transform in transforms_of(env))


def _single(transform: Any) -> list[Transform]:
    if isinstance(transform, Compose):
        return [single for part in transform.transforms for single in _single(part)]
    return [transform]


def _own_reset(env: EnvBase) -> tuple[str, str] | None:
    """What resets by itself and the mend, or None."""
    for part in (*layers_of(env), *transforms_of(env)):
        own = vars(part)
        if isinstance(part, AutoResetEnv | AutoResetTransform) or own.get("auto_reset"):
            return type(part).__name__, "make it with auto_reset=False"
        if own.get("_torchrl_native_autoreset"):
            return "native_autoreset=True", "make it with native_autoreset=False"
        for wrapped in _wrapped(own.get("_env")):
            if "AutoReset" in type(wrapped).__name__:  # of gym, brax, jumanji: their reset replaces the observation
                return type(wrapped).__name__, "make it without that wrapper"
            if getattr(getattr(wrapped, "autoreset_mode", None), "name", "") == "NEXT_STEP":
                return f"{type(wrapped).__name__} with AutoresetMode.NEXT_STEP", MAKE_VECTOR
        for word in (AutoResetTransform.__name__, VecGymEnvTransform.__name__):
            if word in str(own.get("_dummy_env_str")):  # a batch of workers knows its environments by their description
                return f"{word} in {type(part).__name__}", f"make its environments without {word}"
    return None


def _wrapped(env: Any) -> Iterator[Any]:
    """An environment of another library and all that it wraps."""
    while env is not None:
        yield env
        env = getattr(env, "__dict__", {}).get("env")
