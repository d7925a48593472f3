"""The DeepMind Control Suite, stepped in worker processes."""
