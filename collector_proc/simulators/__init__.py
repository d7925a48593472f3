"""Simulators behind one interface (base.py): a registry of backends, and one folder for each of them."""
