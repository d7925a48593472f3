"""Every number that a run reports, declared once: its name, unit, group and meaning.

The learner writes one row to metrics.jsonl every `optimization.log_every` gradient steps. The column names of that row,
the tags in TensorBoard and wandb, the live display, the report and docs/metrics.md are all made from the declarations
here. Code refers to a metric by its constant, so a misspelled name fails when the file is imported.

Between two rows, each process also publishes a small status through its progress file (`shared.progress`). The two
statuses are the dataclasses at the end of this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Value = float | int | str | None


@dataclass(frozen=True)
class Metric:
    """One column of metrics.jsonl, called `name` there. `tag` is its name in TensorBoard and wandb, "group/name"."""

    name: str
    tag: str
    unit: str
    meaning: str

    @property
    def group(self) -> str:
        """Return the part of the tag before the slash, such as "loss"."""
        return self.tag.partition("/")[0]

    def of(self, row: Mapping[str, Any]) -> float | None:
        """Return this metric's number in a row, or None if the row has no finite number for it."""
        value = finite_or_none(row.get(self.name))
        return None if isinstance(value, bool) or not isinstance(value, int | float) else value


METRICS: dict[str, Metric] = {}  # every declared metric by its column name; members of families are not in it


def declare(name: str, tag: str, unit: str, meaning: str) -> Metric:
    """Add a metric to METRICS and return it. Raises: ValueError if its name or its tag is taken."""
    if name in METRICS or any(known.tag == tag for known in METRICS.values()):
        raise ValueError(f"metric {name!r} ({tag!r}) is declared twice; expected unique names and tags; rename one")
    METRICS[name] = Metric(name, tag, unit, meaning)
    return METRICS[name]


# ---- progress of the run ------------------------------------------------------------------------------------------
TIME = declare("time", "run/time", "s since 1970", "When the row was written.")
WALL_S = declare("wall_s", "run/wall_s", "s", "Time that the learner has trained, over all launches of the run.")
GRADIENT_STEPS = declare(
    "gradient_steps", "run/gradient_steps", "steps", "Updates of all three optimisers since the run began."
)
AGENT_STEPS = declare(
    "agent_steps", "run/agent_steps", "agent steps", "Decisions of all environments since the run began."
)
ENV_FRAMES = declare("env_frames", "run/env_frames", "env frames", "Agent steps times the action repeat.")
EVAL_AGENT_STEPS = declare(
    "eval_agent_steps", "run/eval_agent_steps", "agent steps", "Those of agent_steps that evaluation environments made."
)
EPISODES = declare("episodes", "run/episodes", "episodes", "Finished episodes since the run began.")
STARTUP_S = declare("startup_s", "run/startup_s", "s", "Time to build and compile the networks in this launch.")

# ---- returns ------------------------------------------------------------------------------------------------------
EPISODE_RETURN_MEAN = declare(
    "episode_return_mean", "return/train_mean", "reward", "Mean return of the newest 100 training episodes."
)
EVAL_RETURN_MEAN = declare(
    "eval_return_mean", "return/eval_mean", "reward", "Mean return of the newest 20 episodes of evaluations."
)
RANDOM_RETURN_MEAN = declare(
    "random_return_mean", "return/random_mean", "reward", "Mean return of the newest 100 episodes of random actions."
)
EPISODE_LENGTH_MEAN = declare(
    "episode_length_mean", "return/length_mean", "agent steps", "Mean length of the newest 100 episodes of any kind."
)

# ---- evaluation: the newest complete one, which is a number of whole episodes of one policy version ------------------
EVALUATIONS = declare("evaluations", "evaluation/number", "evaluations", "Complete evaluations since the run began.")
EVALUATION_VERSION = declare(
    "evaluation_version", "evaluation/version", "versions", "Policy version of the newest complete evaluation."
)
EVALUATION_GRADIENT_STEPS = declare(
    "evaluation_gradient_steps", "evaluation/gradient_steps", "steps", "Updates before that version was published."
)
EVALUATION_AGENT_STEPS = declare(
    "evaluation_agent_steps",
    "evaluation/agent_steps",
    "agent steps",
    "Agent steps before that version was published; without eval_agent_steps if collector.eval_in_replay is false.",
)
EVALUATION_ENV_FRAMES = declare(
    "evaluation_env_frames", "evaluation/env_frames", "env frames", "The same steps times the action repeat."
)
EVALUATION_EPISODES = declare(
    "evaluation_episodes", "evaluation/episodes", "episodes", "Episodes of the newest complete evaluation."
)
EVALUATION_MEAN = declare("evaluation_mean", "evaluation/mean", "reward", "Mean of their returns.")
EVALUATION_MEDIAN = declare("evaluation_median", "evaluation/median", "reward", "Median of their returns.")
EVALUATION_IQM = declare(
    "evaluation_iqm", "evaluation/iqm", "reward", "Mean of their returns without the lowest and highest quarter."
)
EVALUATION_LOW = declare(
    "evaluation_low", "evaluation/low", "reward", "Lower end of the mean's 95 % interval (bootstrap over episodes)."
)
EVALUATION_HIGH = declare(
    "evaluation_high", "evaluation/high", "reward", "Upper end of the mean's 95 % interval (bootstrap over episodes)."
)

# ---- pace ---------------------------------------------------------------------------------------------------------
COLLECT_FPS = declare(
    "collect_fps", "pace/collect_fps", "agent steps/s", "Agent steps collected per second since the previous row."
)
UPDATES_PER_S = declare(
    "updates_per_s", "pace/updates_per_s", "gradient steps/s", "Gradient steps per second since the previous row."
)
COLLECT_FPS_MEAN = declare(
    "collect_fps_mean",
    "pace/collect_fps_mean",
    "agent steps/s",
    "Agent steps per second since the first collector of this launch began to stream.",
)
UPDATES_PER_S_MEAN = declare(
    "updates_per_s_mean",
    "pace/updates_per_s_mean",
    "gradient steps/s",
    "Gradient steps per second since the first one of this launch.",
)
REPLAY_RATIO = declare(
    "replay_ratio", "pace/replay_ratio", "1", "Replayed agent steps per collected agent step since the prefill."
)
REPLAY_RATIO_TARGET = declare(
    "replay_ratio_target", "pace/replay_ratio_target", "1", "The setting optimization.replay_ratio."
)
POLICY_VERSION = declare("policy_version", "pace/policy_version", "versions", "Version of the weights published last.")
POLICY_LAG_MEAN = declare(
    "policy_lag_mean",
    "pace/policy_lag_mean",
    "versions",
    "Newest version minus the version that acted, mean over the newest 100 chunks.",
)
SAMPLED_VERSION_MEAN = declare(
    "sampled_version_mean", "pace/sampled_version_mean", "versions", "Mean policy version of freshly sampled rows."
)

# ---- losses -------------------------------------------------------------------------------------------------------
LOSS_MODEL = declare(
    "loss_model",
    "loss/model",
    "nats",
    "World model loss: loss_obs + loss_reward + continue_scale x loss_cont + kl_scale x "
    "the KL limited by the free nats.",
)
LOSS_OBS = declare("loss_obs", "loss/obs", "nats", "Negative log-likelihood of the observations.")
LOSS_REWARD = declare("loss_reward", "loss/reward", "nats", "Negative log-likelihood of the rewards.")
LOSS_CONT = declare("loss_cont", "loss/cont", "nats", "Negative log-likelihood of the continue flags.")
LOSS_ACTOR = declare("loss_actor", "loss/actor", "scaled reward", "Actor loss: minus the imagined return.")
LOSS_VALUE = declare("loss_value", "loss/value", "nats", "Critic loss: negative log-likelihood of the lambda return.")

# ---- world model --------------------------------------------------------------------------------------------------
KL = declare("kl", "model/kl", "nats", "KL between posterior and prior, before free nats are applied.")
KL_FREE = declare(
    "kl_free",
    "model/kl_free",
    "share",
    "Share of updates (with free_nats_per=step: of steps) whose KL lies below the free nats, "
    "so that it has no gradient.",
)

# ---- behaviour ----------------------------------------------------------------------------------------------------
IMAGINED_RETURN = declare(
    "imagined_return", "behavior/imagined_return", "scaled reward", "Mean lambda return of imagined trajectories."
)
IMAGINED_REWARD = declare(
    "imagined_reward", "behavior/imagined_reward", "scaled reward", "Mean predicted reward of imagined steps."
)
RETURN_SCALE = declare(
    "return_scale",
    "behavior/return_scale",
    "scaled reward",
    "Divisor of the actor's returns; 1 if return_norm is none.",
)
VALUE_MEAN = declare("value_mean", "behavior/value_mean", "scaled reward", "Mean value of imagined beliefs.")
VALUE_BIAS = declare(
    "value_bias", "behavior/value_bias", "scaled reward", "Mean of value minus lambda return over imagined beliefs."
)
ACTOR_STD = declare("actor_std", "behavior/actor_std", "1", "Mean standard deviation of the actor before the tanh.")
ACTOR_ENTROPY = declare("actor_entropy", "behavior/actor_entropy", "nats", "Entropy of the actor's actions.")
IMAGINED_VALUE = declare(
    "imagined_value", "behavior/imagined_value", "scaled reward", "Critic's value at sampled replay states."
)
RECORDED_RETURN = declare(
    "recorded_return",
    "behavior/recorded_return",
    "scaled reward",
    "Discounted return that was recorded after the same states; compare with imagined_value.",
)

# ---- gradients ----------------------------------------------------------------------------------------------------
GRAD_NORM_MODEL = declare("grad_norm_model", "gradient/norm_model", "1", "World model gradient norm before clipping.")
GRAD_NORM_ACTOR = declare("grad_norm_actor", "gradient/norm_actor", "1", "Actor gradient norm before clipping.")
GRAD_NORM_VALUE = declare("grad_norm_value", "gradient/norm_value", "1", "Critic gradient norm before clipping.")
CLIPPED_MODEL = declare("clipped_model", "gradient/clipped_model", "share", "Share of clipped world model updates.")
CLIPPED_ACTOR = declare("clipped_actor", "gradient/clipped_actor", "share", "Share of clipped actor updates.")
CLIPPED_VALUE = declare("clipped_value", "gradient/clipped_value", "share", "Share of clipped critic updates.")
SKIPPED = declare(
    "skipped", "gradient/skipped", "share", "Share of updates that were skipped because a gradient was not finite."
)
NAN_SKIPS = declare("nan_skips", "gradient/nan_skips", "updates", "Skipped updates since the run began.")

# ---- health -------------------------------------------------------------------------------------------------------
NUM_DIVERGED = declare(
    "num_diverged", "health/num_diverged", "episodes", "Environments that were reset because a number was not finite."
)
ROLLBACKS = declare(
    "rollbacks",
    "health/rollbacks",
    "roll-backs",
    "How often the learner went back to an earlier state since it started; see optimization.max_skipped.",
)
CLIPPED_VALUES = declare(
    "clipped_values",
    "health/clipped_values",
    "numbers",
    "Observed numbers and rewards that were clipped since the run began, because they lay absurdly far from the "
    "others; a warning names them.",
)
MASKED_ROWS = declare(
    "masked_rows",
    "health/masked_rows",
    "environment rows",
    "Rows that arrived with a number that is not finite since the run began, and were replaced by zeros.",
)
TERMINAL_ROWS = declare(
    "terminal_rows",
    "health/terminal_rows",
    "environment rows",
    "Rows that end the task since the run began. Time-outs do not count.",
)
REWARD_MAX = declare(
    "reward_max",
    "health/reward_max",
    "reward",
    "The largest reward without its sign since the run began, after clipping.",
)
SATURATED_ACTIONS = declare(
    "saturated_actions",
    "behavior/saturated_actions",
    "share",
    "Share of the policy's action numbers since the previous row that lie within 0.01 of a limit.",
)
MESSAGES_DROPPED = declare(
    "messages_dropped", "health/messages_dropped", "messages", "Malformed or unexpected messages from collectors."
)
PUBLICATIONS_SKIPPED = declare(
    "publications_skipped",
    "health/publications_skipped",
    "versions",
    "Weights that were not published because both copy buffers were busy.",
)
TRANSPORT = declare("transport", "health/transport", "name", "How chunks travel: cuda_ipc or memfd.")
TRANSPORT_BYTES_PER_S = declare(
    "transport_bytes_per_s", "health/transport_bytes_per_s", "bytes/s", "Rate of the start-up self-test."
)

# ---- memory -------------------------------------------------------------------------------------------------------
LEARNER_RSS_GB = declare(
    "learner_rss_gb", "memory/learner_rss_gb", "GB", "Resident memory of the learner, without shared pages."
)
LEARNER_GPU_GB = declare(
    "learner_gpu_gb",
    "memory/learner_gpu_gb",
    "GB",
    "GPU memory that torch reserved in the learner.",
)
COLLECTOR_RSS_GB = declare(
    "collector_rss_gb",
    "memory/collector_rss_gb",
    "GB",
    "Resident memory of the collector and its workers, without shared pages.",
)
COLLECTOR_GPU_GB = declare(
    "collector_gpu_gb", "memory/collector_gpu_gb", "GB", "GPU memory that torch reserved in the collector."
)
SIM_GPU_USED_GB = declare(
    "sim_gpu_used_gb", "memory/sim_gpu_used_gb", "GB", "Memory in use on the simulator's GPU, by all processes."
)


@dataclass(frozen=True)
class MetricFamily:
    """Metrics that exist once per observation entry and horizon. The texts hold {entry} and {horizon}."""

    name: str
    tag: str
    unit: str
    meaning: str

    def member(self, entry: str, horizon: int) -> Metric:
        """Return the metric of one observation entry and one horizon in agent steps."""
        words = {"entry": entry, "horizon": horizon}
        texts = (self.name, self.tag, self.unit, self.meaning)
        return Metric(*(text.format(**words) for text in texts))


OPEN_LOOP = MetricFamily(
    "open_loop_{entry}_{horizon}",
    "model/open_loop_{entry}_{horizon}",
    "squared error",
    "Mean squared error of the prediction {horizon} steps ahead: the prior follows the recorded actions.",
)
REPEAT_LAST = MetricFamily(
    "repeat_last_{entry}_{horizon}",
    "model/repeat_last_{entry}_{horizon}",
    "squared error",
    "The same error for a prediction that repeats the last observation; a useful model lies far below it.",
)
FAMILIES = (OPEN_LOOP, REPEAT_LAST)


@dataclass(frozen=True)
class DimensionFamily:
    """Metrics that exist once per action dimension. The texts hold {dimension}."""

    name: str
    tag: str
    unit: str
    meaning: str

    @property
    def prefix(self) -> str:
        """Return what the column names begin with."""
        return self.name.partition("{")[0]

    def member(self, dimension: int) -> Metric:
        """Return the metric of one dimension, counted from 0."""
        texts = (self.name, self.tag, self.unit, self.meaning)
        return Metric(*(text.format(dimension=dimension) for text in texts))


SATURATED = DimensionFamily(
    "saturated_action_{dimension}",
    "behavior/saturated_action_{dimension}",
    "share",
    "Share of the actor's samples beyond 0.97 in dimension {dimension}, at sampled replay states.",
)


def finite_or_none(value: Any) -> Any:
    """Return the value, or None in place of NaN and infinity, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_row(values: Mapping[Metric, Value]) -> dict[str, Value]:
    """Return the JSON form of a row: column names instead of metrics, None instead of numbers that are not finite."""
    return {metric.name: finite_or_none(value) for metric, value in values.items()}


def find(name: str) -> Metric | None:
    """Return the metric whose column has this name, members of families included; None if it is not declared."""
    if name in METRICS:
        return METRICS[name]
    dimension = name.removeprefix(SATURATED.prefix)
    if dimension != name and dimension.isdecimal():
        return SATURATED.member(int(dimension))
    for family in FAMILIES:
        prefix = family.name.partition("{")[0]
        entry, _, horizon = name.removeprefix(prefix).rpartition("_")
        if name.startswith(prefix) and entry and horizon.isdecimal():
            return family.member(entry, int(horizon))
    return None


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row under their TensorBoard tags. Columns that are not declared are left out."""
    metrics = [metric for metric in map(find, row) if metric is not None]
    numbers = ((metric.tag, metric.of(row)) for metric in metrics)
    return {tag: value for tag, value in numbers if value is not None}


@dataclass(frozen=True)
class LearnerStatus:
    """What the learner publishes twice a second; the fields mean the same as the metrics of the same name.

    total_optim_steps is the setting.
    """

    gradient_steps: int
    agent_steps: int
    total_optim_steps: int
    updates_per_s: float
    replay_ratio: float
    replay_ratio_target: float | None
    policy_lag_mean: float | None
    episode_return_mean: float | None
    eval_return_mean: float | None


@dataclass(frozen=True)
class CollectorStatus:
    """What a collector publishes after every chunk and while it waits for grants."""

    agent_steps: int  # of the whole run
    fps: float  # agent steps per second over the last seconds
    policy_version: int  # of the weights it acts with; 0 while it acts at random
    weights_refused: int  # messages with weights that could not be used
    rss_gb: float  # memory that was last compared with collector.max_rss_gb
    chunks: int = 0  # that this collector has committed


Status = TypeVar("Status", LearnerStatus, CollectorStatus)


def read_status(kind: type[Status], content: Mapping[str, Any]) -> Status | None:
    """Return the status that a progress file holds (`Snapshot.status`), or None if a field of `kind` is missing.

    A field is missing if the process has not published a status yet. Keys that `kind` does not have are ignored.
    """
    names = [field.name for field in fields(kind)]
    return kind(**{name: content[name] for name in names}) if all(name in content for name in names) else None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of metrics.jsonl, or None if the line is not a JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
