"""The parts of launch.py: options, one run, its two processes and what the user sees. Torch-free at import."""
