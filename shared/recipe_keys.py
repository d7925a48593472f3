"""Keys of TorchRL's Dreamer recipe that do not exist here, and what took their place.

Somebody who brings a command line from `sota-implementations/dreamer` is told what to write instead. A key that ends in
a dot stands for everything below it.
"""

from __future__ import annotations

_DEVICE = "processes get their devices from launch: use --sim-gpu and --train-gpu"
_WINDOWS = "the sampler gathers its windows on the train GPU inside the gradient step, so there is nothing to prefetch"
_EVALUATION = "evaluation runs all the time in some columns of the simulator: see collector.eval_envs"
_GRAPHS = "there is no such switch: the whole gradient step is compiled with optimization.compile.enabled"
_ROLLOUT = "the RSSM is unrolled inside the one gradient step: see optimization.compile.enabled"

RECIPE_KEYS = {
    "env.device": _DEVICE,
    "env.image_size": "images are always 64x64, the size the encoder is built for",
    "env.parallel_env_mode": "environments step in collector.num_collectors worker processes of "
    "env.n_parallel_envs environments each",
    "collector.device": _DEVICE,
    "collector.optim_steps_per_collect": "the two processes never wait on a schedule: the share of learning is "
    "optimization.replay_ratio",
    "collector.compile.": "acting is one small forward pass for all environments and runs uncompiled, on a GPU as one "
    "CUDA graph: see collector.cudagraphs",
    "optimization.compile.losses": _GRAPHS,
    "optimization.actor_value_warmup_steps": "there is no learning-rate warm-up: see optimization.actor_lr "
    "and optimization.value_lr",
    "optimization.device": _DEVICE,
    "networks.device": _DEVICE,
    "networks.use_scan": _ROLLOUT,
    "networks.rssm_rollout.": _ROLLOUT,
    "replay_buffer.device": "set replay_buffer.gpu_storage instead",
    "replay_buffer.scratch_dir": "the replay lives in the train GPU's or in pinned host memory, never on disk; "
    "see replay_buffer.gpu_storage",
    "replay_buffer.prefetch": _WINDOWS,
    "logger.eval_every": _EVALUATION,
    "logger.eval_rollout_steps": _EVALUATION,
    "logger.eval_num_envs": _EVALUATION,
    "logger.video": "a run records no videos",
    "logger.video_skip": "a run records no videos",
    "profiling.": "attach py-spy or Nsight Systems to the running process instead: both processes have names and pids "
    "in logs/launch.jsonl",
}

# Values the recipe knows and what they are called here, in the spelling of a choice.
RECIPE_VALUES = {"optimization.autocast": {"true": "bfloat16"}}


def replacement(key: str) -> str | None:
    """What took the place of a recipe's key, or None if the recipe has no such key."""
    for known, text in RECIPE_KEYS.items():
        if key == known or (known.endswith(".") and (key + ".").startswith(known)):
            return text
    return None
