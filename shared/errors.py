"""The errors that users see. A message has the form: what is wrong, with the value; expected value; how to fix it."""

from collections.abc import Sequence


class SettingError(ValueError):
    """A setting or command-line value cannot work. Launch prints the message and exits with code 2."""


class TransportError(RuntimeError):
    """The other process, or the connection to it, broke the protocol or a deadline."""


class SimulatorError(RuntimeError):
    """A simulator could not be built or stepped."""


def together(errors: Sequence[SettingError]) -> SettingError:
    """Return one error for all of them. Several errors are listed, one on each line."""
    if len(errors) == 1:
        return errors[0]
    return SettingError("\n  ".join([f"{len(errors)} settings cannot work:", *map(str, errors)]))


class HandoverError(TransportError):
    """The two processes cannot share the replay. Another start would fail in the same way."""
