"""The exceptions for what a user can mend: they name the option or file, the value found, and the remedy."""


class UserError(Exception):
    """Bad input. Entry points print it without a traceback and exit with its status."""

    status = 2


class Diverged(UserError):
    """A run whose numbers are no longer finite, and which has stopped for it."""

    status = 3
