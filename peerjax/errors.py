"""Errors that a user can act on."""


class UserError(Exception):
    """An error whose message names the problem and the remedy in one sentence.

    Scripts print only this sentence.

    Attributes:
        exit_status: exit status of a script that stops with this error.
    """

    exit_status = 2


class ConfigError(UserError):
    """A configuration field is unknown, has the wrong type or does not fit the others."""


class DataError(UserError):
    """Text or tokenizer is missing, empty, unreadable, or not the one the run was started with."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or none can be restored."""


class DivergenceError(UserError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_status = 3
