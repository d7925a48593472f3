"""Keys of TorchRL's Dreamer recipe and of other trainers that are no settings here, and what to use instead.

Users paste command lines from TorchRL's `sota-implementations/dreamer`. The error for a key of theirs names its
replacement. A key that ends in a dot stands for every key of that section.
"""

from __future__ import annotations

_DEVICE = "choose the devices of the processes with --sim-gpu and --train-gpu"
_WINDOWS = "remove it: windows are sampled on the train GPU as a part of the gradient step, so nothing is prefetched"
_EVALUATION = "use collector.eval_envs and collector.eval_episodes: some environments evaluate all the time"
_GRAPHS = "use optimization.compile.enabled, which compiles the whole gradient step"
_VIDEO = "remove it: a run records no videos, and `python launch.py play RUN` films its policy at any time"
_ROLLOUT = "use optimization.compile.enabled: the RSSM's steps are a part of the compiled gradient step"

RECIPE_KEYS = {
    "env.device": _DEVICE,
    "env.image_size": "remove it: images always have 64x64 pixels, because the encoder is built for them",
    "env.parallel_env_mode": "use collector.num_collectors worker processes of env.n_parallel_envs environments each",
    "collector.device": _DEVICE,
    "collector.optim_steps_per_collect": "use optimization.replay_ratio, which paces the two processes",
    "collector.compile.": "use collector.cudagraphs: the policy is not compiled, but on a GPU it is one CUDA graph",
    "optimization.compile.losses": _GRAPHS,
    "optimization.actor_value_warmup_steps": "use optimization.actor_lr and optimization.value_lr, which are constant",
    "optimization.device": _DEVICE,
    "networks.device": _DEVICE,
    "networks.use_scan": _ROLLOUT,
    "networks.rssm_rollout.": _ROLLOUT,
    "replay_buffer.device": "use replay_buffer.gpu_storage",
    "replay_buffer.scratch_dir": "use replay_buffer.gpu_storage: the replay is in the memory of the train GPU or of "
    "the host, never on the disk",
    "replay_buffer.prefetch": _WINDOWS,
    "logger.eval_every": _EVALUATION,
    "logger.eval_rollout_steps": _EVALUATION,
    "logger.eval_num_envs": _EVALUATION,
    "logger.exp_name": "use --run-dir runs/NAME: the name of a run is the name of its folder",
    "logger.video": _VIDEO,
    "logger.video_skip": _VIDEO,
    "profiling.": "remove it, and attach py-spy or Nsight Systems to a running process; logs/launch.jsonl has the pids",
}

# Names that other trainers use, in any section.
_RATIO = "use optimization.replay_ratio: replayed agent steps per collected agent step"
OTHER_WORDS = {
    "total_frames": "use optimization.total_optim_steps, the length of a run in gradient steps; "
    "optimization.replay_ratio determines how many frames that takes",
    "train_every": _RATIO,
    "train_ratio": _RATIO,
    "utd_ratio": _RATIO,
    "exp_name": RECIPE_KEYS["logger.exp_name"],
}

# Values of keys above that describe how every run works here. A pasted command line may contain them: they are accepted
# and ignored.
RECIPE_DEFAULTS = {
    "env.image_size": "64",
    "collector.compile.enabled": "false",
    "networks.use_scan": "false",
    "replay_buffer.scratch_dir": "null",
    "logger.video": "false",
    "profiling.enabled": "false",
    "profiling.collector.enabled": "false",
}

# For settings that exist in both: values of the recipe, and the choice that means the same here.
RECIPE_VALUES = {"optimization.autocast": {"true": "bfloat16"}}


def replacement(key: str) -> str | None:
    """Return the end of an error message about a key that another trainer has; None if the key is not known."""
    for known, text in RECIPE_KEYS.items():
        if key == known or (known.endswith(".") and (key + ".").startswith(known)):
            return f"although TorchRL's recipe has it; expected a setting of Tandem; {text}"
    if key.replace("/", ".").startswith("hydra."):
        return (
            "because Hydra only composes the settings here; expected a setting of Tandem; use --run-dir DIR for the "
            "folder of the run, and --config PATH for a config of your own"
        )
    text = OTHER_WORDS.get(key.split(".")[-1])
    return None if text is None else f"although other trainers have it; expected a setting of Tandem; {text}"
