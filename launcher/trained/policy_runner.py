"""Run an exported policy in one environment. This needs numpy and onnxruntime only.

from run_policy import Policy
policy = Policy("runs/NAME/export")
action = policy.act({"policy": observation}, reset=True)   # reset=True at the first step of every episode
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime


class Policy:
    """Keeps the belief from step to step. `act` returns an action in the simulator's units."""

    def __init__(self, folder, seed=None):
        """folder: where policy.json and policy.onnx lie. seed: draw noise as in training; None: act without noise."""
        self.facts = json.loads((Path(folder) / "policy.json").read_text())
        self.session = onnxruntime.InferenceSession(Path(folder) / "policy.onnx", providers=["CPUExecutionProvider"])
        self.sizes = {entry["name"]: entry["shape"][1:] for entry in self.facts["inputs"]}
        self.belief = np.zeros((1, *self.sizes["belief"]), np.float32)
        self.random = None if seed is None else np.random.default_rng(seed)

    def act(self, obs, reset=False):
        """Return the action (A,) for the observations of one environment, by name and not normalised."""
        types = {"float32": np.float32, "uint8": np.uint8}
        inputs = {
            entry["name"]: np.asarray(obs[entry["observation"]], types[entry["type"]])[None]
            for entry in self.facts["inputs"]
            if "observation" in entry
        }
        noise = np.zeros(self.sizes["noise"]) if self.random is None else self.random.normal(size=self.sizes["noise"])
        inputs |= {"belief": self.belief, "reset": np.array([reset]), "noise": noise.astype(np.float32)[None]}
        action, self.belief = self.session.run(["action", "next_belief"], inputs)
        return np.asarray(action)[0]
