"""What the commands do with a trained policy. These files import torch: import them after the simulator has started."""
