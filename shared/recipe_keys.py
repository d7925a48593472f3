"""Keys of TorchRL's Dreamer recipe and of other trainers that do not exist here, and what took their place.

Somebody who brings a command line from `sota-implementations/dreamer` is told what to write instead. A key that ends in
a dot stands for everything below it.
"""

from __future__ import annotations

_DEVICE = "processes get their devices from launch: use --sim-gpu and --train-gpu"
_WINDOWS = "the sampler gathers its windows on the train GPU inside the gradient step, so there is nothing to prefetch"
_EVALUATION = "evaluation runs all the time in some columns of the simulator: see collector.eval_envs"
_GRAPHS = "there is no such switch: the whole gradient step is compiled with optimization.compile.enabled"
_VIDEO = "a run records no videos: leave it out"
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
    "logger.exp_name": "a run is named by its folder: pass --run-dir runs/NAME",
    "logger.video": _VIDEO,
    "logger.video_skip": _VIDEO,
    "profiling.": "attach py-spy or Nsight Systems to the running process instead: both processes have names and pids "
    "in logs/launch.jsonl",
}

# What other trainers call things, in whatever section.
_RATIO = "the share of learning is optimization.replay_ratio, replayed agent steps per collected agent step"
OTHER_WORDS = {
    "total_frames": "a run's length is optimization.total_optim_steps, counted in gradient steps; how many frames they "
    "take follows from optimization.replay_ratio",
    "train_every": _RATIO,
    "train_ratio": _RATIO,
    "utd_ratio": _RATIO,
    "exp_name": RECIPE_KEYS["logger.exp_name"],
}

# Values of such keys that ask for what is so anyway; their keys may be given.
RECIPE_DEFAULTS = {
    "env.image_size": "64",
    "collector.compile.enabled": "false",
    "networks.use_scan": "false",
    "replay_buffer.scratch_dir": "null",
    "logger.video": "false",
    "profiling.enabled": "false",
    "profiling.collector.enabled": "false",
}

# Values the recipe knows and what they are called here, in the spelling of a choice.
RECIPE_VALUES = {"optimization.autocast": {"true": "bfloat16"}}


def replacement(key: str) -> str | None:
    """Who has a key that does not exist here, and what took its place; None for a key that nobody is known to have."""
    for known, text in RECIPE_KEYS.items():
        if key == known or (known.endswith(".") and (key + ".").startswith(known)):
            return f"though TorchRL's recipe has it; wanted a key that exists here; {text}"
    text = OTHER_WORDS.get(key.split(".")[-1])
    return None if text is None else f"though other trainers have it; wanted a key that exists here; {text}"
