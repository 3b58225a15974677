"""What the commands share: the parser of those that are not LightningCLI's, and the console."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.console import Console

from minirec_pl.cli.sentences import one_sentence
from minirec_pl.utils.errors import InputError


class CommandParser(ArgumentParser):
    """A parser that raises one sentence for words that it does not accept, where argparse prints its usage and exits.

    Raises:
        InputError: from `parse_args`, naming the option and what it takes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the sentence."""
        see = f"see `{self.prog} --help`"
        of_nested_parser = r": see `[^`]*`$"
        raise InputError(one_sentence(re.sub(of_nested_parser, "", message), see)) from ex


def console(pipe_width: int = 120) -> Console:
    """A console of the terminal's width, or of `pipe_width` columns where the output goes to a pipe or a file."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=pipe_width)
