"""Every setting of a run: its type, default, unit, bounds and a line that explains it.

The defaults are the sizes of TorchRL's Dreamer recipe for cheetah-run from pixels, with the number of gradient steps of
Dreamer V1. The files in `configs/` replace some of them. As in that recipe, "frames" in a setting's name counts agent
steps, which are rows of the replay. An env frame is one of the `env.frame_skip` simulator steps of an agent step.

`shared/compose.py` checks the type and the bounds of each setting, `shared/geometry.py` whether they fit each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

MAX_COUNT = 10**12  # of steps and rows: with larger numbers, sizes in bytes would exceed 64 bits
MAX_WIDTH = 100_000  # of a layer
MAX_S = 1e8  # three years: timers of the operating system accept it
# The collector adds 1000 for each restart and 1,000,000 for each resume, and seeds of simulators have 32 bits.
MAX_SEED = 2**31 - 1


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple = (),
) -> Any:
    """Return a dataclass field. Its metadata is for the checks, the error messages and docs/settings.md."""
    metadata = {"doc": doc, "unit": unit, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class EnvSettings:
    """The simulator and the task."""

    backend: str = setting(
        "dm_control", "Simulator backend: one of the names in the table of collector_proc/simulators/registry.py."
    )
    name: str = setting(
        "cheetah",
        "dm_control: domain; isaaclab, mjlab: task id; torchrl: gym:ID or module:callable; pendulum: 'pendulum'.",
    )
    task: str = setting(
        "run", "dm_control: the task of the domain; pendulum: 'swingup' or 'balance'; other backends: must be empty."
    )
    seed: int = setting(
        0, "Seed of the simulator, the networks' initial weights and all sampling.", minimum=0, maximum=MAX_SEED
    )
    frame_skip: int = setting(
        2,
        "Simulator steps per agent step; rewards are summed over them. isaaclab, mjlab: 1, as tasks repeat actions.",
        unit="env frames",
        minimum=1,
        maximum=10_000,
    )
    from_pixels: bool = setting(True, "Observe 64x64 images (uint8) instead of state vectors.")
    grayscale: bool = setting(False, "Use one image channel instead of three; needs from_pixels.")
    n_parallel_envs: int = setting(
        8, "dm_control: number of environments in each worker process.", unit="environments", minimum=1, maximum=100_000
    )
    num_envs: Optional[int] = setting(
        None,
        "Backends other than dm_control: number of environments stepped together.",
        unit="environments",
        minimum=1,
        maximum=10_000_000,
    )
    horizon: Optional[int] = setting(
        None,
        "End episodes as time-outs after this many steps; null: the task's limit.",
        unit="agent steps",
        minimum=2,
        maximum=MAX_COUNT,
    )
    action_scale: Any = setting(
        1.0,
        "isaaclab, mjlab, torchrl: s, or a list of one per dimension. No bounds: [-s, s]; one: [low, low + 2s] or "
        "[high - 2s, high].",
        minimum=1e-6,
    )
    action_bounds: str = setting(
        "task",
        "isaaclab, mjlab: joint_limits: action_scale counts in shares of the way from the standing pose to the farther "
        "joint limit.",
        choices=("task", "joint_limits"),
    )
    obs_groups: Optional[list[str]] = setting(
        None,
        "isaaclab, mjlab, torchrl: observations to use; null: group 'policy' or 'actor' if it exists, otherwise all.",
    )
    isaac_overrides: Optional[list[str]] = setting(
        None,
        "isaaclab, version 3: presets and fields of the task in Isaac Lab's own form, such as "
        "[physics=newton_mjwarp,env.decimation=4].",
    )
    image_low: float = setting(0.0, "isaaclab, mjlab, torchrl: value of a float image that becomes byte 0.")
    image_high: float = setting(1.0, "isaaclab, mjlab, torchrl: value of a float image that becomes byte 255.")
    drop_alpha: bool = setting(
        False, "isaaclab, mjlab, torchrl: a fourth channel of an image is transparency: leave it out."
    )
    randomize_start: bool = setting(
        True, "isaaclab, mjlab: start the first training episodes at random ages, so that they do not all end together."
    )
    reward_per_second: bool = setting(
        False,
        "isaaclab, mjlab: divide rewards by the duration of an agent step, because the task multiplies them by it.",
    )


@dataclass
class CollectorSettings:
    """How the collector gathers experience, and when it is restarted."""

    num_collectors: int = setting(
        7,
        "dm_control: number of worker processes; 0: step the environments in the collector.",
        minimum=0,
        maximum=10_000,
    )
    frames_per_batch: int = setting(
        1000,
        "Size of a chunk of experience; rounded to whole ticks of all environments.",
        unit="agent steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    mode: str = setting(
        "async",
        "async: collect and train at the same time; lockstep: in turn, slower but reproducible.",
        choices=("async", "lockstep"),
    )
    init_random_frames: int = setting(
        10_000,
        "Steps with uniform random actions before training starts.",
        unit="agent steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    eval_envs: int = setting(
        1,
        "Environments that evaluate: they act without noise, with weights that change only between evaluations.",
        unit="environments",
        minimum=0,
        maximum=10_000_000,
    )
    eval_episodes: Optional[int] = setting(
        None,
        "Episodes of one evaluation, all of one policy version; rounded up to as many in each environment. null: one "
        "in each.",
        unit="episodes",
        minimum=1,
        maximum=500,
    )
    eval_in_replay: bool = setting(
        True, "Learn from the rows of evaluation environments too; false: never sample them, and count them apart."
    )
    eval_action: str = setting(
        "mode",
        "Action of evaluation environments: the most likely of 100 samples (mode) or the tanh of the mean (mean).",
        choices=("mode", "mean"),
    )
    cudagraphs: bool = setting(True, "On a GPU, run the policy as one CUDA graph.")
    max_restarts: int = setting(
        10,
        "How many deaths of collectors within healthy_after_s of collecting a run survives.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    max_rss_gb: Optional[float] = setting(
        None,
        "For leaking simulators: restart the collector if it and its workers hold more memory than this; null: never.",
        unit="GB",
        minimum=0.1,
        maximum=1e6,
    )
    healthy_after_s: float = setting(
        3600.0,
        "After this much collecting, a death no longer counts towards max_restarts.",
        unit="s",
        minimum=0.0,
        maximum=MAX_S,
    )
    recycle_after_hours: Optional[float] = setting(
        None,
        "For leaking simulators: replace the collector, between two chunks, after this much collecting; null: never.",
        unit="hours",
        minimum=1e-4,
        maximum=1e6,
    )


@dataclass
class CompileSettings:
    """Compilation of the gradient step."""

    enabled: bool = setting(True, "Compile the networks of the gradient step with torch.compile.")
    cudagraphs: bool = setting(True, "On a GPU, run sampling and the gradient step as one CUDA graph, compiled or not.")
    backend: str = setting("inductor", "Backend of torch.compile.", choices=("inductor", "aot_eager", "eager"))


@dataclass
class OptimizationSettings:
    """The gradient step: losses, learning rates, precision and replay ratio."""

    total_optim_steps: int = setting(100_000, "Length of the run.", unit="gradient steps", minimum=1, maximum=MAX_COUNT)
    log_every: int = setting(
        100, "Gradient steps between two rows of metrics.jsonl.", unit="gradient steps", minimum=1, maximum=MAX_COUNT
    )
    replay_ratio: Optional[float] = setting(
        2000.0,
        "Replayed agent steps per collected agent step; the faster process waits. null: neither process waits.",
        minimum=1e-9,
    )
    pretrain_steps: int = setting(
        100,
        "Gradient steps on the prefill alone, at most what replay_ratio gives for it; the ratio counts later rows.",
        unit="gradient steps",
        minimum=0,
        maximum=MAX_COUNT,
    )
    publish_every: int = setting(
        10,
        "Gradient steps between two publications of new weights to the collector.",
        unit="gradient steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    grad_clip: float = setting(
        100.0,
        "Largest global gradient norm of each of the three optimisers; larger gradients are scaled down.",
        minimum=1e-9,
    )
    world_model_lr: float = setting(6e-4, "Learning rate (Adam) of the world model.", minimum=0.0)
    actor_lr: float = setting(8e-5, "Learning rate (Adam) of the actor.", minimum=0.0)
    value_lr: float = setting(8e-5, "Learning rate (Adam) of the critic.", minimum=0.0)
    adam_eps: float = setting(1e-5, "Epsilon of the three Adam optimisers.", minimum=0.0)
    kl_scale: float = setting(1.0, "Weight of the KL in the loss of the world model.", minimum=0.0)
    kl_balance: Optional[float] = setting(
        None,
        "Share of the KL's gradient that trains the prior (usually 0.8), not the posterior; null: an unweighted KL.",
        minimum=0.0,
        maximum=1.0,
    )
    free_nats: Optional[float] = setting(
        None, "A KL below this has no gradient; null: 3 with pixels, 1 without.", unit="nats", minimum=0.0
    )
    free_nats_per: str = setting(
        "mean",
        "Apply free_nats to the mean KL of the batch (mean) or to the KL of each step (step).",
        choices=("mean", "step"),
    )
    reward_scale: float = setting(
        1.0, "Factor on rewards before the networks learn them; reported returns stay unscaled.", minimum=1e-9
    )
    continue_scale: float = setting(
        10.0, "Weight of the continue head's loss; see networks.continue_head.", minimum=0.0
    )
    gamma: float = setting(0.99, "Discount factor per agent step.", minimum=0.0, maximum=1.0)
    lmbda: float = setting(
        0.95,
        "Lambda of the lambda-return: 0 is a one-step target, 1 the full imagined return.",
        minimum=0.0,
        maximum=1.0,
    )
    imagination_horizon: int = setting(
        15, "Length of an imagined trajectory.", unit="agent steps", minimum=2, maximum=10_000
    )
    imagination_starts: Optional[int] = setting(
        None,
        "Number of random steps of a batch from which imagination starts; null: all of them.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    actor_gradient: str = setting(
        "dynamics",
        "How the actor learns: dynamics (through the model, as V1), reinforce (score function), mix (0.9 reinforce).",
        choices=("dynamics", "reinforce", "mix"),
    )
    entropy_scale: float = setting(
        0.0, "Weight of the actor's entropy in its objective; 0: no entropy bonus.", minimum=0.0
    )
    slow_critic_decay: Optional[float] = setting(
        None,
        "Decay (usually 0.98) of a moving average of the critic, used for the lambda-return; null: use the critic.",
        minimum=0.0,
        maximum=1.0,
    )
    return_norm: str = setting(
        "none",
        "percentile: divide the actor's returns by the running range of their 5th to 95th percentile (at least 1).",
        choices=("none", "percentile"),
    )
    max_skipped: int = setting(
        100,
        "After so many steps in a row without a finite gradient, the learner goes back to an earlier state.",
        unit="gradient steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_rollbacks: int = setting(
        3,
        "How often the learner may go back to an earlier state within 10,000 steps before the run ends.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    autocast: str = setting(
        "bfloat16",
        "Precision of matrix products; false: float32; true is accepted and means bfloat16.",
        choices=("bfloat16", "float16", "false"),
    )
    compile: CompileSettings = field(default_factory=CompileSettings)


@dataclass
class NetworkSettings:
    """Sizes of the networks, and how the actor explores."""

    state_dim: int = setting(30, "Size of the stochastic state.", minimum=1, maximum=MAX_WIDTH)
    rssm_hidden_dim: int = setting(
        200, "Size of the deterministic state and of every layer of the RSSM.", minimum=1, maximum=MAX_WIDTH
    )
    hidden_dim: int = setting(
        400, "Size of every layer of the heads and of the vector encoder.", minimum=1, maximum=MAX_WIDTH
    )
    encoder_channels: int = setting(
        32, "Channels of the first layer of the image encoder; later layers have more.", minimum=1, maximum=MAX_WIDTH
    )
    activation: str = setting("elu", "Activation function of the dense layers.", choices=("elu", "relu", "silu"))
    continue_head: bool = setting(
        False, "Learn to predict whether the episode goes on; needed if the task can end before its time limit."
    )
    normalize_obs: bool = setting(
        True, "Normalise each dimension of vector observations by its running mean and variance."
    )
    symlog_obs: bool = setting(
        False, "Compress vector observations with sign(x) ln(1 + |x|) instead of clipping them after normalisation."
    )
    init_std: float = setting(
        5.0, "Standard deviation of the actor's actions before the tanh, at the start of training.", minimum=1e-3
    )
    actor_min_std: float = setting(
        1e-4,
        "Lowest standard deviation of the actor's actions before the tanh; 0.1 explores without exploration_noise.",
        minimum=1e-6,
    )
    exploration_noise: float = setting(
        0.3, "Standard deviation of the noise that is added to training actions.", minimum=0.0
    )


@dataclass
class ReplaySettings:
    """The replay buffer and the batches that are drawn from it."""

    buffer_size: int = setting(
        1_000_000,
        "Size of the replay; the oldest steps are overwritten.",
        unit="agent steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    batch_size: int = setting(
        10_000, "Steps sampled for one gradient step.", unit="agent steps", minimum=1, maximum=MAX_COUNT
    )
    batch_length: int = setting(
        50,
        "Length of each sampled window; batch_size must be a multiple of it.",
        unit="agent steps",
        minimum=2,
        maximum=MAX_COUNT,
    )
    gpu_storage: Optional[bool] = setting(
        None,
        "Keep the replay in the memory of the train GPU; false: in pinned host memory; null: only if the collector "
        "cannot write to that GPU.",
    )
    max_deviation: Optional[float] = setting(
        100.0,
        "Clip observed numbers and rewards further than this from the mean of their dimension, and further "
        "than 1000; null: clip only at 1e15.",
        unit="standard deviations",
        minimum=10.0,
        maximum=1e9,
    )
    checksum: bool = setting(False, "Verify the checksum of every chunk when it arrives; slow, for debugging.")


@dataclass
class LoggerSettings:
    """Where metrics are sent besides metrics.jsonl."""

    backend: str = setting(
        "tensorboard", "Where launch sends the rows of metrics.jsonl.", choices=("tensorboard", "wandb", "none")
    )
    project: str = setting("tandem", "Project name in wandb.")
    mode: str = setting("online", "Mode of wandb.", choices=("online", "offline", "disabled"))


@dataclass
class CheckpointSettings:
    """When checkpoints are saved, and what they contain."""

    every_s: float = setting(
        1800.0, "Time between two checkpoints; one more is written at the end.", unit="s", minimum=1.0, maximum=MAX_S
    )
    every_steps: int = setting(
        5000,
        "lockstep: gradient steps between two checkpoints, instead of every_s; all episodes begin again there.",
        unit="gradient steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    keep: int = setting(2, "Number of newest checkpoints that are kept.", minimum=1, maximum=MAX_COUNT)
    keep_best: bool = setting(
        True, "Also keep the checkpoint with the highest mean evaluation return, later without its replay."
    )
    keep_every_h: Optional[float] = setting(
        24.0,
        "Also keep one checkpoint in each span of this length, later without its replay; null: none.",
        unit="h",
        minimum=0.01,
        maximum=1e6,
    )
    replay: bool = setting(
        True, "Save the replay too; false makes small checkpoints, but a resumed run refills its replay."
    )


@dataclass
class DeadlineSettings:
    """How long each phase of a process may take without progress."""

    start_s: float = setting(
        600.0,
        "Longest start of a process: imports, building its simulator or networks, connecting.",
        unit="s",
        minimum=1.0,
        maximum=MAX_S,
    )
    compile_s: float = setting(
        1800.0, "Longest first gradient step, which includes compilation.", unit="s", minimum=1.0, maximum=MAX_S
    )
    step_s: float = setting(
        300.0, "Longest tick of the simulator and longest gradient step.", unit="s", minimum=1.0, maximum=MAX_S
    )
    save_s: float = setting(900.0, "Longest time to save or load a checkpoint.", unit="s", minimum=1.0, maximum=MAX_S)
    stop_s: float = setting(
        30.0,
        "Longest time that the collector may take to end after it is asked to.",
        unit="s",
        minimum=1.0,
        maximum=MAX_S,
    )


@dataclass
class SupervisionSettings:
    """How launch replaces processes that died, and of what it warns whom."""

    max_learner_restarts: int = setting(
        5,
        "How many deaths of learners within an hour of training a run survives; each next one starts from the newest "
        "checkpoint.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    backoff_s: float = setting(
        1.0,
        "Pause before a process starts after two deaths without progress; each further death doubles it, up to 300 s.",
        unit="s",
        minimum=0.0,
        maximum=300.0,
    )
    warn_hours: float = setting(
        12.0,
        "Warn if disk, memory or GPU memory will be used up within this time at the present pace.",
        unit="hours",
        minimum=0.0,
        maximum=1e4,
    )
    on_event: Optional[str] = setting(
        None,
        "Shell command that gets a JSON object on stdin at restarts, warnings and the end of the run; null: none.",
    )
    on_event_s: float = setting(
        30.0, "Longest time of one call of on_event; then it is killed.", unit="s", minimum=0.1, maximum=3600.0
    )


@dataclass
class Settings:
    """All settings of a run."""

    env: EnvSettings = field(default_factory=EnvSettings)
    collector: CollectorSettings = field(default_factory=CollectorSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    networks: NetworkSettings = field(default_factory=NetworkSettings)
    replay_buffer: ReplaySettings = field(default_factory=ReplaySettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    deadlines: DeadlineSettings = field(default_factory=DeadlineSettings)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)
