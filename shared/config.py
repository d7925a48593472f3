"""Every setting of a run: its type, default, unit, bounds and one line of doc, and the sizes that follow from them.

The defaults are the reference's numbers for cheetah-run from pixels; the files in `configs/` overlay them.
"Frames" in a setting's name counts agent steps (rows of the replay), as in the reference; an env frame is an
agent step times `env.frame_skip`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from shared.errors import SettingError


def setting(
    default: Any, doc: str, *, minimum: float | None = None, maximum: float | None = None, choices: tuple = ()
) -> Any:
    """A dataclass field whose doc line, bounds and choices are kept for the checks and for `--help`."""
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "maximum": maximum, "choices": choices})


@dataclass
class EnvSettings:
    backend: str = setting(
        "dm_control", "simulator backend: a name in the table of collector_proc/simulators/registry.py"
    )
    name: str = setting(
        "cheetah",
        "domain (dm_control), task id (isaaclab, mjlab), gym:Id or module:callable (torchrl); pendulum: 'pendulum'",
    )
    task: str = setting("run", "task of the domain (dm_control); pendulum: 'swingup' or 'balance'")
    seed: int = setting(0, "seed of simulator, networks and sampling", minimum=0)
    frame_skip: int = setting(2, "simulator steps per agent step; rewards are summed over them", minimum=1)
    from_pixels: bool = setting(True, "observe 64x64 images (uint8) instead of state vectors")
    grayscale: bool = setting(False, "one image channel instead of three")
    n_parallel_envs: int = setting(8, "dm_control: environments stepped by each worker process", minimum=1)
    num_envs: Optional[int] = setting(None, "all but dm_control: environments stepped together", minimum=1)
    horizon: Optional[int] = setting(
        None,
        "cut episodes as time-outs after this many agent steps (a direct isaaclab task that does not stop one step short of "
        "its limit, as they usually do: one more); null: the task's own limit",
        minimum=2,
    )
    action_scale: float = setting(
        1.0,
        "isaaclab, mjlab, torchrl: what actions in [-1, 1] are multiplied by where the task sets no bounds; where it sets one, "
        "they reach twice this from it",
        minimum=1e-6,
    )
    obs_groups: Optional[list[str]] = setting(
        None,
        "isaaclab, mjlab, torchrl: observation groups to stream; null: 'policy' or 'actor', else all of them (torchrl: but "
        "bookkeeping, as step counts and infos)",
    )
    image_low: float = setting(0.0, "isaaclab, mjlab, torchrl: the value in float images that becomes byte 0")
    image_high: float = setting(1.0, "isaaclab, mjlab, torchrl: the value in float images that becomes byte 255")
    randomize_start: bool = setting(
        True,
        "isaaclab, mjlab: first training episodes start at random ages, so that time-outs do not coincide for good",
    )
    reward_per_second: bool = setting(
        False, "isaaclab, mjlab: divide rewards by the agent step's seconds, which these simulators multiply them by"
    )


@dataclass
class CollectorSettings:
    num_collectors: int = setting(7, "dm_control: worker processes; 0 steps in the collector's own process", minimum=0)
    frames_per_batch: int = setting(
        1000, "agent steps in one chunk; rounded to whole ticks of all environments", minimum=1
    )
    mode: str = setting(
        "async", "collect and train side by side, or strictly in turn (reproducible)", choices=("async", "lockstep")
    )
    init_random_frames: int = setting(
        10_000, "agent steps of uniform random actions before the first gradient step", minimum=1
    )
    eval_envs: int = setting(
        1, "columns, spread evenly, that act without noise and are reported as evaluation", minimum=0
    )
    eval_action: str = setting(
        "mode",
        "action of evaluation columns: most likely of 100 samples, or tanh of the mean",
        choices=("mode", "mean"),
    )
    cudagraphs: bool = setting(True, "on a GPU: the acting step as one CUDA graph")
    max_restarts: int = setting(
        10, "times a dead collector is started again before the run ends; see healthy_after_s", minimum=0
    )
    max_rss_gb: Optional[float] = setting(
        None,
        "GB of resident memory of its own, workers included, above which the collector ends after a chunk and is started "
        "again; a death (see max_restarts) unless it had collected for ten times as long as its start took, or for "
        "healthy_after_s; null: no limit",
        minimum=0.1,
    )
    healthy_after_s: float = setting(
        3600.0,
        "seconds of collecting since its last death after which a collector's deaths are forgotten; restarts for "
        "max_rss_gb that are no deaths do not interrupt them",
        minimum=0.0,
    )


@dataclass
class CompileSettings:
    enabled: bool = setting(True, "torch.compile the cells and heads of the gradient step")
    cudagraphs: bool = setting(True, "on a GPU: sampling and gradient step as one CUDA graph, compiled or not")
    backend: str = setting("inductor", "backend of torch.compile", choices=("inductor", "aot_eager", "eager"))


@dataclass
class OptimizationSettings:
    total_optim_steps: int = setting(100_000, "gradient steps of the whole run", minimum=1)
    log_every: int = setting(100, "gradient steps between two rows of metrics.jsonl", minimum=1)
    replay_ratio: Optional[float] = setting(
        500.0, "replayed agent steps per collected agent step; null: both processes run free", minimum=1e-9
    )
    publish_every: int = setting(10, "gradient steps between two pushes of the acting weights", minimum=1)
    grad_clip: float = setting(100.0, "global gradient norm, for each of the three optimisers", minimum=1e-9)
    world_model_lr: float = setting(6e-4, "Adam step size of the world model", minimum=0.0)
    actor_lr: float = setting(8e-5, "Adam step size of the actor", minimum=0.0)
    value_lr: float = setting(8e-5, "Adam step size of the critic", minimum=0.0)
    adam_eps: float = setting(1e-5, "Adam epsilon", minimum=0.0)
    kl_scale: float = setting(1.0, "weight of the KL term of the world-model loss", minimum=0.0)
    kl_balance: Optional[float] = setting(
        None, "share of the KL gradient that trains the prior (0.8 is usual); null: plain KL", minimum=0.0, maximum=1.0
    )
    free_nats: Optional[float] = setting(
        None, "floor under the mean KL, nats; null: 3 with pixels, 1 without", minimum=0.0
    )
    free_nats_per: str = setting(
        "mean", "what free_nats is a floor under: the mean KL of a batch, or every step's own", choices=("mean", "step")
    )
    reward_scale: float = setting(
        1.0, "factor on every reward before it is learned; reported returns stay unscaled", minimum=1e-9
    )
    continue_scale: float = setting(10.0, "weight of the continue head's loss", minimum=0.0)
    gamma: float = setting(0.99, "discount per agent step", minimum=0.0, maximum=1.0)
    lmbda: float = setting(0.95, "lambda of the lambda-return", minimum=0.0, maximum=1.0)
    imagination_horizon: int = setting(15, "imagined agent steps", minimum=2)
    imagination_starts: Optional[int] = setting(
        None, "beliefs of a batch, drawn anew at random, that imagination starts from; null: all of them", minimum=1
    )
    entropy_scale: float = setting(0.0, "weight of the actor's entropy beside its returns; 0: none", minimum=0.0)
    slow_critic_decay: Optional[float] = setting(
        None,
        "share that a slow copy of the critic, whose values the lambda-return takes, keeps of itself at every step "
        "(0.98 is usual); null: the critic's own values",
        minimum=0.0,
        maximum=1.0,
    )
    return_norm: str = setting(
        "none",
        "what the actor's returns are divided by: nothing, or the running range of their 5th to 95th percentile, "
        "at least 1",
        choices=("none", "percentile"),
    )
    autocast: str = setting(
        "bfloat16", "precision of matrix products; true means bfloat16", choices=("bfloat16", "float16", "false")
    )
    compile: CompileSettings = field(default_factory=CompileSettings)


@dataclass
class NetworkSettings:
    state_dim: int = setting(30, "size of the stochastic state", minimum=1)
    rssm_hidden_dim: int = setting(200, "size of the deterministic state and of every RSSM layer", minimum=1)
    hidden_dim: int = setting(400, "units of every layer of the heads and of the vector encoder", minimum=1)
    encoder_channels: int = setting(32, "channels of the image encoder's first layer", minimum=1)
    activation: str = setting("elu", "activation of dense layers", choices=("elu", "relu", "silu"))
    continue_head: bool = setting(False, "learn when episodes end; needed where a task can terminate")
    normalize_obs: bool = setting(True, "running per-dimension normalisation of vector observations")
    symlog_obs: bool = setting(False, "compress vector observations to sign(x) ln(1 + |x|) where else they are clipped")
    init_std: float = setting(5.0, "standard deviation of the actor at initialisation, before the tanh", minimum=1e-3)
    exploration_noise: float = setting(0.3, "standard deviation of the noise added to training actions", minimum=0.0)


@dataclass
class ReplaySettings:
    buffer_size: int = setting(1_000_000, "agent steps held", minimum=1)
    batch_size: int = setting(10_000, "agent steps in one gradient step", minimum=1)
    batch_length: int = setting(50, "agent steps in one sampled window", minimum=2)
    gpu_storage: bool = setting(True, "keep the replay in the train GPU's memory; false: in pinned host memory")
    checksum: bool = setting(False, "check every chunk's checksum when it is committed")


@dataclass
class LoggerSettings:
    backend: str = setting(
        "tensorboard", "where launch forwards metrics.jsonl to", choices=("tensorboard", "wandb", "none")
    )
    project: str = setting("tandem", "wandb project")
    mode: str = setting("online", "wandb mode", choices=("online", "offline", "disabled"))


@dataclass
class CheckpointSettings:
    every_s: float = setting(1800.0, "seconds between checkpoints; one more is written at the end", minimum=1.0)
    keep: int = setting(2, "newest checkpoints kept", minimum=1)
    replay: bool = setting(True, "store the replay with the weights")


@dataclass
class DeadlineSettings:
    start_s: float = setting(
        600.0, "seconds a process may take to import, build its simulator or networks and say hello", minimum=1.0
    )
    compile_s: float = setting(1800.0, "seconds the first gradient step may take", minimum=1.0)
    step_s: float = setting(300.0, "seconds one tick or one gradient step may take", minimum=1.0)
    save_s: float = setting(900.0, "seconds a checkpoint may take", minimum=1.0)
    stop_s: float = setting(30.0, "seconds the collector may take to end after it was asked to", minimum=1.0)


@dataclass
class Settings:
    env: EnvSettings = field(default_factory=EnvSettings)
    collector: CollectorSettings = field(default_factory=CollectorSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    networks: NetworkSettings = field(default_factory=NetworkSettings)
    replay_buffer: ReplaySettings = field(default_factory=ReplaySettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    deadlines: DeadlineSettings = field(default_factory=DeadlineSettings)


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from the settings: whole ticks, whole chunks, whole windows."""

    num_envs: int  # E
    ticks_per_chunk: int  # K
    capacity: int  # rows of the ring for each environment, T_cap
    prefill_chunks: int
    num_sequences: int  # B
    sequence_length: int  # L

    @property
    def frames_per_chunk(self) -> int:
        return self.ticks_per_chunk * self.num_envs

    @property
    def frames_per_step(self) -> int:
        return self.num_sequences * self.sequence_length

    @property
    def prefill_frames(self) -> int:
        return self.prefill_chunks * self.frames_per_chunk


def num_envs(settings: Settings) -> int:
    """E: env.num_envs of a batched simulator, else workers (0 counts as 1) times environments of each.

    Raises: SettingError if a batched simulator has no env.num_envs.
    """
    if settings.env.backend == "dm_control":
        return max(1, settings.collector.num_collectors) * settings.env.n_parallel_envs
    if settings.env.num_envs is None:
        raise SettingError(
            f"env.num_envs=null leaves env.backend={settings.env.backend} without a number of environments; wanted at "
            "least 1; set env.num_envs=8 (env.n_parallel_envs and collector.num_collectors are for dm_control)"
        )
    return settings.env.num_envs


def geometry(settings: Settings, num_envs: int) -> Geometry:
    """The sizes a run really uses: chunks of whole ticks, a ring and a prefill of whole chunks."""
    collector, replay = settings.collector, settings.replay_buffer
    ticks = max(1, round(collector.frames_per_batch / num_envs))
    return Geometry(
        num_envs=num_envs,
        ticks_per_chunk=ticks,
        capacity=replay.buffer_size // num_envs // ticks * ticks,
        prefill_chunks=math.ceil(collector.init_random_frames / (ticks * num_envs)),
        num_sequences=replay.batch_size // replay.batch_length,
        sequence_length=replay.batch_length,
    )


def geometry_notes(settings: Settings, num_envs: int) -> list[str]:
    """One line for every number that rounding changed."""
    sizes, collector, replay = geometry(settings, num_envs), settings.collector, settings.replay_buffer
    notes, held = [], sizes.capacity * num_envs
    if sizes.frames_per_chunk != collector.frames_per_batch:
        notes.append(
            f"collector.frames_per_batch={collector.frames_per_batch} becomes {sizes.frames_per_chunk}: "
            f"{sizes.ticks_per_chunk} ticks of {num_envs} environments"
        )
    if held != replay.buffer_size:
        notes.append(
            f"replay_buffer.buffer_size={replay.buffer_size} becomes {held}: {sizes.capacity} rows "
            f"({sizes.capacity // sizes.ticks_per_chunk} chunks) for each of {num_envs} environments"
        )
    if sizes.prefill_frames != collector.init_random_frames:
        notes.append(
            f"collector.init_random_frames={collector.init_random_frames} becomes {sizes.prefill_frames}: "
            f"{sizes.prefill_chunks} whole chunks"
        )
    return notes


def check_settings(settings: Settings, num_envs: int) -> None:
    """Pass if the settings fit each other for `num_envs` environments, before any GPU or simulator is touched.

    Raises: SettingError naming the keys, the values met, the values wanted and the mend.
    """
    _check_lockstep(settings)
    _check_columns(settings, num_envs)
    _check_batch(settings)
    _check_starts(settings)
    _check_ring(settings, geometry(settings, num_envs))


def _check_lockstep(settings: Settings) -> None:
    if settings.collector.mode == "lockstep" and settings.optimization.replay_ratio is None:
        raise SettingError(
            "collector.mode=lockstep with optimization.replay_ratio=null never knows when a turn ends; wanted a number; "
            "set optimization.replay_ratio=64 or collector.mode=async"
        )


def _check_columns(settings: Settings, num_envs: int) -> None:
    eval_envs = settings.collector.eval_envs
    if eval_envs >= num_envs:
        raise SettingError(
            f"collector.eval_envs={eval_envs} leaves no training column among {num_envs} environments; "
            f"it must be below {num_envs}; lower it or raise the number of environments"
        )


def _check_batch(settings: Settings) -> None:
    size, length = settings.replay_buffer.batch_size, settings.replay_buffer.batch_length
    if size < length or size % length:
        nearest = max(1, round(size / length)) * length
        raise SettingError(
            f"replay_buffer.batch_size={size} is not a whole number of windows of batch_length={length}; "
            f"wanted a multiple of {length}; set replay_buffer.batch_size={nearest}"
        )


def _check_starts(settings: Settings) -> None:
    starts, size = settings.optimization.imagination_starts, settings.replay_buffer.batch_size
    if starts is not None and starts > size:
        raise SettingError(
            f"optimization.imagination_starts={starts} is more than the replay_buffer.batch_size={size} beliefs of a "
            f"gradient step; wanted at most {size}; lower it, or set it to null for all of them"
        )


def _check_ring(settings: Settings, sizes: Geometry) -> None:
    ticks, length, num_envs = sizes.ticks_per_chunk, sizes.sequence_length, sizes.num_envs
    # Two chunks may be granted, hence out of the sampler's reach, while one window must still be whole.
    wanted = math.ceil((length + 2 * ticks) / ticks) * ticks
    if sizes.capacity < wanted:
        raise SettingError(
            f"replay_buffer.buffer_size={settings.replay_buffer.buffer_size} holds {sizes.capacity} rows for each of "
            f"{num_envs} environments, fewer than batch_length + two chunks = {length} + 2*{ticks}; wanted at least "
            f"{wanted} rows; raise it to at least {wanted * num_envs} or lower the number of environments"
        )
    prefill = sizes.prefill_chunks * ticks
    if prefill < length:
        raise SettingError(
            f"collector.init_random_frames={settings.collector.init_random_frames} fills {prefill} rows for each of "
            f"{num_envs} environments before the first gradient step, fewer than replay_buffer.batch_length={length}; "
            f"wanted at least {length} rows; raise it to at least {length * num_envs}"
        )
    if prefill > sizes.capacity:
        raise SettingError(
            f"collector.init_random_frames={settings.collector.init_random_frames} is a prefill of "
            f"{sizes.prefill_frames} agent steps, more than the {sizes.capacity * num_envs} that "
            f"replay_buffer.buffer_size={settings.replay_buffer.buffer_size} holds; wanted a prefill that fits; "
            f"lower it or raise replay_buffer.buffer_size"
        )
