"""Write images sampled from a run's replay into one PNG. Its rows are sampled windows, its columns their steps.

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
    """Return images (windows, steps, 64, 64, C) in uint8, drawn from the newest checkpoint by the learner's sampler.

    Raises: SettingError if the run observes no pixels or has no usable checkpoint.
    """
    batch = open_run(run_dir)[2].sample(windows, steps)
    if ("obs", "pixels") not in batch.keys(include_nested=True):
        names = ", ".join(sorted(map(str, batch.get("obs").keys())))
        raise SettingError(
            f"{run_dir} observes {names} and no pixels; expected a run with env.from_pixels=true; name such a run"
        )
    return batch["obs", "pixels"]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run from pixels that has a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    parser.add_argument("--windows", type=int, default=4, help="number of sampled windows, one per row of the picture")
    parser.add_argument("--steps", type=int, default=8, help="number of consecutive steps in a window")
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
