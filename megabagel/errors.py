"""The one exception for mistakes that a user can mend: it is printed as one message, without a traceback."""


class UserError(Exception):
    """A mistake in a config, file, environment or command line.

    The message names the key or file, the value found, what was expected and the next step. The command line prints it
    and exits with code 2; library callers may catch it.
    """
