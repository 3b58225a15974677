"""Writes minirec_pl/cli/options.json, what the command knows of its options without importing torch: `make options`.

With `--check` it prints the list that the parsers give instead.
"""

import dataclasses
import inspect
import json
import platform
import sys
from argparse import SUPPRESS, HelpFormatter
from importlib import import_module
from importlib.metadata import version
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningDataModule

from minirec_pl.cli.fit import CLI_OPTIONS, MiniRecCLI
from minirec_pl.cli.known import LIST
from minirec_pl.cli.main import OWN_COMMANDS, TRAINER_COMMANDS
from minirec_pl.trainers.recommender import RecModule

PUBLIC = (
    "minirec_pl",
    "minirec_pl.callbacks",
    "minirec_pl.data.sources",
    "minirec_pl.policy",
    "minirec_pl.probes",
    "minirec_pl.rewards",
    "minirec_pl.selection",
)


class Made(Exception):
    """The parsers are there, and nothing is to be parsed."""


class OnlyParsers(MiniRecCLI):
    def parse_arguments(self, parser, args):
        raise Made


def trainer_parsers():
    cli = OnlyParsers.__new__(OnlyParsers)
    try:
        cli.__init__(RecModule, LightningDataModule, **CLI_OPTIONS, parser_kwargs={"prog": "minirec"}, args=["fit"])
    except Made:
        return cli._subcommand_parsers
    raise AssertionError("it was parsed")


def rows_of(parser):
    """The options of a parser by group, in words, in the order of its help."""
    groups = {}
    required = {action.dest for action in parser._actions if action.required}
    required |= getattr(parser, "_extra_required_keys", set())

    class Recorder(DefaultHelpFormatter if isinstance(parser, ArgumentParser) else HelpFormatter):
        def start_section(self, heading):
            super().start_section(heading)
            groups[heading] = self.rows = []

        def add_argument(self, action):
            super().add_argument(action)
            if action.help is not SUPPRESS:
                self.rows.append(row_of(action, " ".join(self._expand_help(action).split()), required))

    parser.formatter_class = Recorder
    parser.format_help()
    return {title: rows for title, rows in groups.items() if rows}


def row_of(action, text, required):
    row = {"names": list(action.option_strings), "key": action.dest, "help": text}
    if action.metavar is not None:
        row["metavar"] = str(action.metavar)
    elif getattr(action, "choices", None):
        row["metavar"] = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs is not None:
        row["nargs"] = action.nargs
    if action.dest in required:
        row["required"] = True
    return row if action.dest.endswith(".help") else {**row, **value_of(action)}


def value_of(action):
    """What can be given: one of some words, the options of a class."""
    hint = getattr(action, "_typehint", None)
    kinds = parts_of(hint)
    value = {}
    words = [*(action.choices or ())]
    for kind in kinds:
        words += ["true", "false"] if kind is bool else []
        words += [part for part in get_args(kind) if isinstance(part, str)] if get_origin(kind) is Literal else []
    if words:
        value["values"] = [*dict.fromkeys(words)]
    fields = [kind for kind in kinds if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]
    if len(fields) == 1:
        value["class"] = f"{fields[0].__module__}.{fields[0].__qualname__}"
    elif isinstance(action.default, dict | Namespace) and "class_path" in action.default:
        value["class"] = action.default["class_path"]
    return value


def parts_of(hint):
    """The types of a union."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def options_of(kind):
    """The options of a class, each with what can be given."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "of", fail_untyped=False)
    actions = {action.dest.removeprefix("of."): action for action in parser._actions if action.dest.startswith("of.")}
    return {name: value_of(action) for name, action in actions.items() if not name.endswith(".help")}


def classes():
    """The public classes and the dataclasses that their options take."""
    from minirec_pl.cli.stages import WarmStart

    found = {f"{WarmStart.__module__}.{WarmStart.__qualname__}": options_of(WarmStart)}
    for place in PUBLIC:
        for name in import_module(place).__all__:
            kind = getattr(import_module(place), name)
            if inspect.isclass(kind) and not issubclass(kind, Exception) and not getattr(kind, "_is_protocol", False):
                found[f"{place}.{name}"] = options_of(kind)
    for options in list(found.values()):
        for value in options.values():
            path = value.get("class")
            if path and path.startswith("minirec_pl.") and path not in found:
                place, _, name = path.rpartition(".")
                found[path] = options_of(getattr(import_module(place), name))
    return found


def option_list():
    """All of it."""
    parsers = trainer_parsers()
    parsers = {name: parsers[name] for name in TRAINER_COMMANDS}
    parsers["check"] = parsers["fit"]
    for name, place in OWN_COMMANDS.items():
        if name != "check":
            parsers[name] = import_module(place).parser()
    groups, commands = {}, {}
    for command, parser in parsers.items():
        titles, rows = {}, rows_of(parser)
        if command == "check":
            from minirec_pl.cli.check_saving import parser as own_parser

            rows |= rows_of(own_parser())
        for title, options in rows.items():
            shared = groups.setdefault(title, options) == options
            titles[title] = title if shared else f"{title} of {command}"
            groups[titles[title]] = options
        commands[command] = {"description": parser.description, "groups": titles}
    made_with = {name: version(name) for name in ("jsonargparse", "lightning")}
    return {
        "made_with": {"python": ".".join(platform.python_version_tuple()[:2]), **made_with},
        "commands": commands,
        "groups": groups,
        "classes": classes(),
    }


if __name__ == "__main__":
    text = json.dumps(option_list(), indent=1) + "\n"
    if sys.argv[1:] == ["--check"]:
        sys.stdout.write(text)
    else:
        LIST.write_text(text, encoding="utf-8")
        print(LIST)
