"""Write images sampled from a run's replay into one PNG: rows are sampled windows, columns their steps.

python -m benchmarks.show_frames runs/cheetah --out frames.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from learner_proc.startup import open_run
from shared.errors import SettingError


def sample_frames(run_dir: Path, windows: int, steps: int) -> torch.Tensor:
    """Images (windows, steps, 64, 64, C) uint8, drawn by the learner's own sampler from the newest checkpoint."""
    batch = open_run(run_dir)[2].sample(windows, steps)
    if ("obs", "pixels") not in batch.keys(include_nested=True):
        met = ", ".join(sorted(map(str, batch.get("obs").keys())))
        raise SettingError(
            f"{run_dir} observes {met} and no pixels; wanted a run with env.from_pixels=true; name another"
        )
    return batch["obs", "pixels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a run from pixels that has a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--windows", type=int, default=4, help="sampled windows, one row each")
    parser.add_argument("--steps", type=int, default=8, help="consecutive steps of a window")
    arguments = parser.parse_args()
    try:
        frames = sample_frames(arguments.run, arguments.windows, arguments.steps)
    except SettingError as error:
        parser.error(str(error))
    grid = frames.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)  # (windows * 64, steps * 64, C)
    image = Image.fromarray(grid.expand(-1, -1, 3).contiguous().numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(arguments.out)


if __name__ == "__main__":
    main()
