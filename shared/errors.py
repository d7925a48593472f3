"""The errors that speak to people: what is wrong, the value met, the value wanted, the mend."""


class SettingError(ValueError):
    """A setting or command-line value that cannot work; launch prints it and exits with code 2."""


class TransportError(RuntimeError):
    """The other process or the link to it broke the protocol or a deadline."""


class SimulatorError(RuntimeError):
    """A simulator could not be built or stepped."""
