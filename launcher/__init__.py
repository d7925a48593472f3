"""What launch.py is made of: devices, children, the watch over them, and what a user sees. Torch-free at import."""
