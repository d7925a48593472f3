"""NVIDIA Isaac Lab."""
