"""The one exception for what a user can mend: it names the option or file, the value found, and the remedy."""


class UserError(Exception):
    """Bad input. Entry points print it without a traceback and exit with status 2."""
