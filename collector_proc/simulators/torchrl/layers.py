"""Look into a torchrl environment: its wrappers, its transforms, and whether it resets itself. Imports torch.

An environment that resets itself can lose the last observation of an episode. This table shows what each kind returns:

EnvBase(auto_reset=True), AutoResetTransform     the last observation is NaN, or the first one of the next episode
native_autoreset=True                            the last observation is the first one of the next episode
gymnasium vector, NEXT_STEP (GymEnv's default)   the last observation is zeros; the first one is of the old episode
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

# These transforms add entries that describe the run, such as a step count. They are not observations.
ACCOUNTS = (InitTracker, RewardSum, StepCounter, TargetReturn, Timer, TrajCounter)
MAKE_VECTOR = (
    "make it as torchrl.envs.GymWrapper(gymnasium.make_vec(ID, num_envs=N, "
    "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.DISABLED}))"
)


def layers_of(env: EnvBase) -> Iterator[EnvBase]:
    """Yield the environment and every environment inside it, the outermost first."""
    yield env
    while isinstance(env, TransformedEnv):
        env = env.base_env
        yield env


def transforms_of(env: EnvBase) -> list[Transform]:
    """Return the transforms in the order in which a step passes through them."""
    inner_first = reversed([layer for layer in layers_of(env) if isinstance(layer, TransformedEnv)])
    return [transform for layer in inner_first for transform in _single(layer.transform)]


def refuse_own_resets(env: EnvBase) -> None:
    """Check that no observation is lost at the end of an episode.

    Raises: SettingError if the environment resets itself in a way that overwrites the last observation.
    """
    found = _own_reset(env)
    if found is not None:
        what, fix = found
        raise SettingError(
            f"the environment resets itself ({what}), which overwrites the last observation of every episode; "
            f"expected one that waits for reset(); {fix}"
        )


def bookkeeping(env: EnvBase) -> set[tuple[str, ...]]:
    """Return the keys in the observation spec that describe the run and are not observations.

    These are infos that a reader copies, entries that the transforms in ACCOUNTS add, and entries that other transforms
    of torchrl compute only from such entries, rewards and ends. For a batch of workers, the keys of one worker are
    included if a worker environment can be created.
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
        # A transform may overwrite an existing entry, for example a RewardSum around workers that sum rewards too.
        added = after - _keys(before["full_observation_spec"]) | after & _keys(transform.out_keys)
        read = _keys(transform.in_keys)
        # A user's own transform may compute a real observation from a reward, so only torchrl's are considered.
        of_torchrl = type(transform).__module__.startswith("torchrl.")
        if isinstance(transform, ACCOUNTS) or (of_torchrl and read and read <= known):
            found, known = found | added, known | added
    return found


@contextmanager
def _worker(batch: EnvBase) -> Iterator[EnvBase | None]:
    """Yield one worker environment: the first of a SerialEnv, else a temporary one that is closed on exit.

    Yield None if the environment has no workers, or if none can or may be created in this process.
    """
    own = vars(batch).get("_envs")  # set after the batch has started
    elsewhere = vars(batch).get("_metadata_from_workers", False)  # the user asked to create none in this process
    if not isinstance(batch, BatchedEnvBase) or own or elsewhere:
        yield own[0] if isinstance(batch, SerialEnv) and own else None
        return
    try:
        made = batch.create_env_fn[0](**batch.create_env_kwargs[0])
    except Exception:  # a user's function can raise anything; the caller logs what is streamed then
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
    """Return whether rows can be reset that are not done. gymnasium's vectors in SAME_STEP mode cannot do it."""
    return not any(isinstance(transform, VecGymEnvTransform) for transform in transforms_of(env))


def _single(transform: Any) -> list[Transform]:
    if isinstance(transform, Compose):
        return [single for part in transform.transforms for single in _single(part)]
    return [transform]


def _own_reset(env: EnvBase) -> tuple[str, str] | None:
    """Return which part resets itself and how to fix it, or None if no part does."""
    for part in (*layers_of(env), *transforms_of(env)):
        own = vars(part)
        if isinstance(part, AutoResetEnv | AutoResetTransform) or own.get("auto_reset"):
            return type(part).__name__, "make it with auto_reset=False"
        if own.get("_torchrl_native_autoreset"):
            return "native_autoreset=True", "make it with native_autoreset=False"
        for wrapped in _wrapped(own.get("_env")):
            # Wrappers of gym, brax and jumanji have such names. Their reset replaces the last observation.
            if "AutoReset" in type(wrapped).__name__:
                return type(wrapped).__name__, "make it without that wrapper"
            if getattr(getattr(wrapped, "autoreset_mode", None), "name", "") == "NEXT_STEP":
                return f"{type(wrapped).__name__} with AutoresetMode.NEXT_STEP", MAKE_VECTOR
        for word in (AutoResetTransform.__name__, VecGymEnvTransform.__name__):
            # A batch of workers has a text that describes its environments.
            if word in str(own.get("_dummy_env_str")):
                return f"{word} in {type(part).__name__}", f"make its environments without {word}"
    return None


def _wrapped(env: Any) -> Iterator[Any]:
    """Yield an environment of another library and all environments inside it."""
    while env is not None:
        yield env
        env = getattr(env, "__dict__", {}).get("env")
