"""Make a folder of robot assets for Isaac Lab 3 that needs no network: `python -m tests.isaaclab3.assets FOLDER`.

Isaac Lab downloads its robots from NVIDIA. With ISAACSIM_ASSET_ROOT=FOLDER it reads them from a folder instead. The
wheel of newton has copies of two of these files, the cart-pole and the ant; the ground plane is ours.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

GROUND_PLANE = Path(__file__).with_name("ground_plane.usda")
CARTPOLE = "Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd"
ANT = "Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd"
GROUND = "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda"


def make_assets(folder: Path) -> None:
    """Write the cart-pole, the ant and a ground plane under `folder`, with the names that Isaac Lab looks for.

    Raises: FileNotFoundError if newton is not installed.
    """
    spec = importlib.util.find_spec("newton")
    if spec is None:
        raise FileNotFoundError("newton is not installed; expected the version that Isaac Lab 3 needs; install it")
    source = Path((spec.submodule_search_locations or [])[0]) / "examples" / "assets"
    for name in (CARTPOLE, ANT, GROUND):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    # The file names a default prim that it does not have.
    text = (source / "cartpole_single_pendulum.usda").read_text()
    (folder / CARTPOLE).write_text(text.replace('defaultPrim = "cartPole"', 'defaultPrim = "cartpole"'))
    shutil.copy(source / "ant.usda", folder / ANT)
    shutil.copy(GROUND_PLANE, folder / GROUND)


if __name__ == "__main__":
    make_assets(Path(sys.argv[1]).resolve())
