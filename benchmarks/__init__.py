"""Measurements of speed and of learning, with their results in results/."""
