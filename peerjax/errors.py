"""Errors that a user can act on."""


class UserError(Exception):
    """One sentence that names what is wrong and how to mend it; scripts print it bare.

    Attributes:
        exit_status: of a script that ends with it.
    """

    exit_status = 2


class ConfigError(UserError):
    """A configuration field is unknown, ill-typed or does not fit the others."""


class DataError(UserError):
    """Text or tokenizer is missing, empty, unreadable or not what the run was started with."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or none can be restored."""


class DivergenceError(UserError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_status = 3
