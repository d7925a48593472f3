"""What users of other trainers type first, and the answer that leads them on. Nothing is started."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import launch
from launcher.foreign_flags import MEANINGS
from launcher.main import ROOT
from shared.compose import setting_keys

ANSWERS = {
    # rsl_rl and Isaac Lab
    "--task Isaac-Velocity-Flat-Anymal-C-v0": "instead of --task use env.name=NAME, after --config with the simulator",
    "--task Isaac-Cartpole-v0 --headless": "instead of --headless use nothing, because a training opens no window",
    "--num_envs 4096": "instead of --num_envs use env.num_envs=N",
    "--num_envs=4096": "instead of --num_envs use env.num_envs=N",
    "--num-envs 4096": "instead of --num-envs use env.num_envs=N",
    "--max_iterations 1500": "instead of --max_iterations use optimization.total_optim_steps=N, in gradient steps",
    "--seed 42": "instead of --seed use env.seed=N",
    "--device cuda:0": "instead of --device use --sim-gpu N and --train-gpu N",
    "--device cpu": "for the CPU, set CUDA_VISIBLE_DEVICES to nothing",
    "--video --video_length 200": "instead of --video, --video_length use another command, also while the run trains",
    "--enable_cameras": "instead of --enable_cameras use --config isaaclab_camera",
    "--logger wandb": "instead of --logger use logger.backend=tensorboard, wandb or none",
    "--experiment_name walk": "instead of --experiment_name use --run-dir DIR",
    "--resume": "argument --resume: expected one argument",
    "--load_run 2024-01-01": "instead of --load_run use --resume DIR",
    "--checkpoint model_100.pt": "instead of --checkpoint use --resume DIR",
    "--distributed": "instead of --distributed use --sim-gpu and --train-gpu",
    # Hydra
    "--multirun env.seed=0,1,2": "use a loop of the shell: for seed in 0 1 2; do python launch.py env.seed=$seed; done",
    "-m env.seed=0,1,2": "instead of -m use a loop of the shell",
    "env.seed=0,1,2": "expected one value for an existing setting",
    "--cfg job": "instead of --cfg use --print-config",
    "--info defaults": "instead of --info use --print-config",
    "--config-name quickstart": "instead of --config-name use --config NAME, or --config PATH for a file of your own",
    "--config-path conf": "or --config PATH for a file of your own",
    "hydra.run.dir=out": "use --run-dir DIR for the folder of the run",
    "hydra/launcher=slurm": "because Hydra only composes the settings here",
    "+env.wind=1": "adds, deletes or sweeps",
    "~env.seed": "adds, deletes or sweeps",
    # TorchRL's recipe
    "logger.video=True": "`python launch.py play RUN` films its policy at any time",
    "collector.total_frames=5000000": "use optimization.total_optim_steps",
    "env.backend=gym": "set env.backend=torchrl env.name=gym:ID",
    "env.backend=gymnasium env.name=HalfCheetah-v5": "set env.backend=torchrl env.name=gym:ID",
    "logger.backend=mlflow": "expected one of tensorboard, wandb, none; set logger.backend to one of them",
    "env.device=cuda:0": "choose the devices of the processes with --sim-gpu and --train-gpu",
    # stable-baselines3 and CleanRL
    "--algo ppo --env HalfCheetah-v5": "instead of --env use --config gym env.name=gym:ID",
    "--env-id Hopper-v4 --total-timesteps 1000000": "instead of --total-timesteps use optimization.total_optim_steps=N",
    "--track --wandb-project-name walk": "instead of --wandb-project-name use logger.project=NAME",
    "--capture-video": "python launch.py play RUN",
    "--learning-rate 3e-4": "instead of --learning-rate use optimization.world_model_lr=X",
    "--eval-freq 1000": "instead of --eval-freq use another command: python launch.py evaluate RUN",
    "-n 100000": "give settings as key=value, such as env.seed=3",
    # danijar's dreamerv3
    "--configs dmc_vision --task dmc_walker_walk": "instead of --configs use --config NAME",
    "--logdir ~/logs": "instead of --logdir use --run-dir DIR",
    # words
    "train": "'train' is neither a command nor a setting",
    "eval runs/NAME": "'eval' is neither a command nor a setting",
    "evalute runs/NAME": "write evaluate",
    "--config quikstart": "use --config quickstart",
    "--sim-gpus 1": "write --sim-gpu",
    "--headles": "give settings as key=value, such as env.seed=3",
}


@pytest.mark.parametrize("line", ANSWERS)
def test_a_command_line_of_another_trainer_gets_an_answer_that_leads_on(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.main(shlex.split(line), commands={"learner": ("false",), "collector": ("false",)}) == 2
    error = capsys.readouterr().err
    assert ANSWERS[line] in error, error
    assert not list(tmp_path.iterdir())


def test_every_translation_names_settings_configs_and_options_that_exist() -> None:
    keys = {key for key, _ in setting_keys()}
    known = {"--config", "--print-config", "--run-dir", "--resume", "--sim-gpu", "--train-gpu"}
    for flag, meaning in MEANINGS.items():
        for word in meaning.replace(",", " ").replace(":", " ").split():
            name = word.partition("=")[0]
            if "=" in word and "." in name:
                assert name in keys, f"{flag}: {name}"
            if word.startswith("--"):
                assert word in known, f"{flag}: {word}"
        for config in ("isaaclab", "isaaclab_camera", "gym"):
            assert f"--config {config}" not in meaning or (ROOT / "configs" / f"{config}.yaml").exists()


def test_no_flag_of_ours_is_translated() -> None:
    for flag in ("config", "sim_gpu", "train_gpu", "run_dir", "resume", "version", "help", "print_config"):
        assert flag not in MEANINGS
