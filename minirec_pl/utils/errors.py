"""The one error type whose message is written for the person at the keyboard."""

from numbers import Integral


class InputError(ValueError):
    """Bad input from outside: a file, an option, a reward function.

    The message is one sentence that names the file, line, column or option and says how to fix it. The command line
    prints it without a traceback and exits with code 2.
    """


def check_whole(**options: object) -> None:
    """Refuses numbers with a fraction, such as 2.5 rollouts, and what is not a number; None is allowed.

    Args:
        options: by name.

    Raises:
        InputError: naming the option.
    """
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"{name} is {value!r}: give a whole number")
