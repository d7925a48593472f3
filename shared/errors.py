"""The errors that speak to people: what is wrong, the value met, the value wanted, the mend."""

from collections.abc import Sequence


class SettingError(ValueError):
    """A setting or command-line value that cannot work; launch prints it and exits with code 2."""


class TransportError(RuntimeError):
    """The other process or the link to it broke the protocol or a deadline."""


class SimulatorError(RuntimeError):
    """A simulator could not be built or stepped."""


def together(errors: Sequence[SettingError]) -> SettingError:
    """All of them as one error: the only one as it is, several each on a line of its own."""
    if len(errors) == 1:
        return errors[0]
    return SettingError("\n  ".join([f"{len(errors)} settings cannot work:", *map(str, errors)]))
