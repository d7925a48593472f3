"""Write the folder of a run with checkpoints of small networks, as a training would leave it."""

from __future__ import annotations

import json
import time

import torch

from learner_proc import checkpoint
from learner_proc.checkpoint import Content
from learner_proc.gradient_step import GradientStep
from shared.compose import save_settings
from shared.config import CheckpointSettings, Settings
from shared.run_folder import RunFolder
from shared.stream import StreamSpec

SMALL = [
    "networks.state_dim=4",
    "networks.rssm_hidden_dim=16",
    "networks.hidden_dim=16",
    "networks.encoder_channels=2",
]
STEPS = (10, 20)
RETURNS = {5: 30.0, 10: 90.0, 20: 50.0}  # gradient steps -> the run's own evaluation return


def save_run(folder: RunFolder, settings: Settings, spec: StreamSpec, steps: tuple[int, ...] = STEPS) -> None:
    """Write config.yaml, metrics.jsonl, status.json and, for each of `steps`, a checkpoint with other weights."""
    folder.path.mkdir(parents=True)
    save_settings(settings, folder.config)
    generator = torch.Generator().manual_seed(0)
    seen = {
        name: 2 * torch.randn(64, *entry.shape, generator=generator) + 1
        for name, entry in spec.obs.items()
        if not entry.is_image
    }
    for step in steps:
        torch.manual_seed(step)
        learner = GradientStep(spec, settings, device=torch.device("cpu"))
        learner.policy.normaliser.update(seen)
        state = {"gradient_step": learner.state_dict()}
        options = CheckpointSettings(keep=len(steps))
        checkpoint.save(folder.checkpoints, Content(step, state, {}, spec.digest(), RETURNS.get(step)), None, options)
    rows = [{"gradient_steps": step, "eval_return_mean": value} for step, value in RETURNS.items()]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.status.write_text(json.dumps({"state": "finished", "updated": time.time()}))
