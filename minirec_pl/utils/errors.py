"""The one error type whose message is written for the person at the keyboard."""


class InputError(ValueError):
    """Bad input from outside: a file, an option, a reward function.

    The message is one sentence that names the file, line, column or option and says how to fix it. The command line
    prints it without a traceback and exits with code 2.
    """
