"""A pendulum written in torch: a simulator that needs no installation."""
