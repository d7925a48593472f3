"""What well-known flags of other trainers are called here. Torch-free.

They are those of rsl_rl, Isaac Lab, stable-baselines3, CleanRL, Hydra and TorchRL's recipes.
"""

from __future__ import annotations

from collections.abc import Iterable

_COUNT = "env.num_envs=N (with dm_control collector.num_collectors=N env.n_parallel_envs=M)"
_TASK = "env.name=NAME, after --config with the simulator, such as --config isaaclab env.name=Isaac-Cartpole-v0"
_GYM = "--config gym env.name=gym:ID"
_LENGTH = "optimization.total_optim_steps=N, in gradient steps"
_GPU = "--sim-gpu N and --train-gpu N; for the CPU, set CUDA_VISIBLE_DEVICES to nothing"
_HEADLESS = "nothing, because a training opens no window"
_SWEEP = "a loop of the shell: for seed in 0 1 2; do {command} env.seed=$seed; done"
_CONFIG = "--config NAME, or --config PATH for a file of your own"
_PRINT = "--print-config"
_VIDEO = "another command, also while the run trains: {command} play RUN"
_LOGGER = "logger.backend=tensorboard, wandb or none"
_FOLDER = "--run-dir DIR: the name of a run is the name of its folder"
_RESUME = "--resume DIR"
_EVALUATE = "another command: {command} evaluate RUN (and collector.eval_envs=N evaluates during the training)"
_OUTPUT = "logger.project=NAME"

MEANINGS = {
    "num_envs": _COUNT,
    "n_envs": _COUNT,
    "num_workers": "collector.num_collectors=N, the worker processes of dm_control",
    "task": _TASK,
    "task_name": _TASK,
    "env": _GYM,
    "env_id": _GYM,
    "env_name": _GYM,
    "gym_id": _GYM,
    "domain": "env.name=DOMAIN env.task=TASK",
    "seed": "env.seed=N",
    "headless": _HEADLESS,
    "no_headless": _HEADLESS,
    "enable_cameras": "--config isaaclab_camera, or env.from_pixels=true",
    "max_iterations": _LENGTH,
    "iterations": _LENGTH,
    "total_timesteps": _LENGTH,
    "n_timesteps": _LENGTH,
    "total_frames": _LENGTH,
    "num_steps": _LENGTH,
    "steps": _LENGTH,
    "device": _GPU,
    "gpu": _GPU,
    "gpus": _GPU,
    "gpu_id": _GPU,
    "cuda": _GPU,
    "cpu": _GPU,
    "rl_device": "--train-gpu N",
    "sim_device": "--sim-gpu N",
    "distributed": "--sim-gpu and --train-gpu, the GPUs of the two processes",
    "multirun": _SWEEP,
    "m": _SWEEP,
    "sweep": _SWEEP,
    "cfg": _PRINT,
    "info": _PRINT,
    "show_config": _PRINT,
    "config_name": _CONFIG,
    "config_path": _CONFIG,
    "config_dir": _CONFIG,
    "config_file": _CONFIG,
    "cn": _CONFIG,
    "cp": _CONFIG,
    "cd": _CONFIG,
    "configs": _CONFIG,
    "video": _VIDEO,
    "video_length": _VIDEO,
    "video_interval": _VIDEO,
    "record_video": _VIDEO,
    "capture_video": _VIDEO,
    "save_video": _VIDEO,
    "play": _VIDEO,
    "render": _VIDEO,
    "logger": _LOGGER,
    "log_backend": _LOGGER,
    "track": _LOGGER,
    "wandb": _LOGGER,
    "use_wandb": _LOGGER,
    "tensorboard": _LOGGER,
    "tensorboard_log": _LOGGER,
    "wandb_project": _OUTPUT,
    "wandb_project_name": _OUTPUT,
    "log_project_name": _OUTPUT,
    "project": _OUTPUT,
    "experiment_name": _FOLDER,
    "exp_name": _FOLDER,
    "run_name": _FOLDER,
    "logdir": _FOLDER,
    "log_dir": _FOLDER,
    "log_folder": _FOLDER,
    "output_dir": _FOLDER,
    "out": _FOLDER,
    "name": _FOLDER,
    "load_run": _RESUME,
    "checkpoint": _RESUME,
    "ckpt": _RESUME,
    "load": _RESUME,
    "trained_agent": _RESUME,
    "lr": "optimization.world_model_lr=X, optimization.actor_lr=X and optimization.value_lr=X",
    "learning_rate": "optimization.world_model_lr=X, optimization.actor_lr=X and optimization.value_lr=X",
    "batch_size": "replay_buffer.batch_size=N, in agent steps",
    "buffer_size": "replay_buffer.buffer_size=N, in agent steps",
    "gamma": "optimization.gamma=X",
    "train_ratio": "optimization.replay_ratio=X",
    "save_freq": "checkpoint.every_s=X",
    "save_interval": "checkpoint.every_s=X",
    "test": _EVALUATE,
}


def translations(arguments: Iterable[str], command: str) -> list[str]:
    """Return what to use instead of each known flag of another trainer, in the order of the arguments.

    command: how the user starts this program.
    """
    flags: dict[str, list[str]] = {}  # by their meaning
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_").lower()
        meaning = MEANINGS.get(name, _EVALUATE if name.startswith("eval") else None)
        if argument.startswith("-") and meaning is not None:
            flags.setdefault(meaning, []).append(flag)
    return [f"instead of {', '.join(named)} use {meaning.format(command=command)}" for meaning, named in flags.items()]
