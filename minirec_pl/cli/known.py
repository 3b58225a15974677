"""What is known of the commands' options without importing torch: a list made of their parsers by `make options`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("options.json")
FLAGS = 0  # values that an option without any takes
Row = Mapping[str, Any]


@cache
def option_list() -> dict[str, Any]:
    """The list: commands with their groups of options, and classes with theirs."""
    made: dict[str, Any] = json.loads(LIST.read_text(encoding="utf-8"))
    return made


@cache
def is_known(command: str) -> bool:
    """Whether the list holds a command, and was made with the Lightning that is installed (its features, not fixes)."""
    made_with, here = option_list()["made_with"]["lightning"], version("lightning")
    return command in option_list()["commands"] and made_with.split(".")[:2] == here.split(".")[:2]


def groups_of(command: str) -> dict[str, list[Row]]:
    """The options of a command by the title of their group."""
    groups = option_list()["groups"]
    return {title: groups[key] for title, key in option_list()["commands"][command]["groups"].items()}


def options_of(command: str) -> dict[str, Row]:
    """The options of a command by name, without the leading dashes; those without a name by where they stand."""
    rows = [row for group in groups_of(command).values() for row in group]
    return {name.lstrip("-").rstrip("+"): row for row in rows for name in row["names"] or [row["key"]]}


def help_of(command: str) -> str:
    """What `minirec COMMAND --help` prints."""
    rows = options_of(command)
    parser = argparse.ArgumentParser(
        prog=f"minirec {command}",
        usage=None if len(rows) < 20 else f"minirec {command} --config FILE [options]",
        description=option_list()["commands"][command]["description"],
        add_help=False,
        allow_abbrev=False,
    )
    for title, group in groups_of(command).items():
        own = {"positional arguments": parser, "options": parser}
        place = own.get(title) or parser.add_argument_group(title)
        for row in group:
            takes = {name: row[name] for name in ("nargs", "metavar", "required") if name in row}
            if not row["names"]:
                takes.pop("required", None)
            else:
                takes.setdefault("metavar", row["key"].rpartition(".")[2].upper())
            if takes.get("nargs") == FLAGS:
                takes = {"action": "store_true"}
            place.add_argument(*(row["names"] or [row["key"]]), **takes, help=row["help"].replace("%", "%%"))
    return parser.format_help()


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of some names in brackets, after a space; nothing if none is near.

    Example:
        >>> did_you_mean("max_epoch", ["max_epochs", "min_epochs"])
        ' (did you mean max_epochs?)'
    """
    near = get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
