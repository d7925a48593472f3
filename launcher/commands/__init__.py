"""The commands of `python launch.py COMMAND`: one module each, listed in table.py."""
