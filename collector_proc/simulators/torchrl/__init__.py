"""Environments of torchrl and gymnasium."""
