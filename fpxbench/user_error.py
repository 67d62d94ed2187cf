"""Errors that a user can correct. Imports no torch."""


class UserError(RuntimeError):
    """The message says what is wrong and the way out. A command prints it and ends with exit status 2."""
