"""What a user can get wrong."""


class InputError(ValueError):
    """Bad input: config, data, model folder, command line. The message names the thing, the value and what is allowed.

    The command line prints the message alone and exits with 2.
    """
