"""The parser's many-line messages and help texts on one line, and a YAML file checked before the parser sees it."""

from __future__ import annotations

import re
import sys
from argparse import Action
from pathlib import Path
from pkgutil import iter_modules

import yaml
from jsonargparse import DefaultHelpFormatter

from minirec_pl.cli.configs import shipped_configs
from minirec_pl.cli.known import did_you_mean, option_list
from minirec_pl.cli.own_classes import what_is_wrong
from minirec_pl.utils.errors import InputError

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z`*])")
_COMMENT_LENGTH = 160
_GOT = re.compile(r"(?:Given value: NestedArg\(key='.*?', val=(.*)\)|Got value: (.*)|Given value: (.*))")


def one_sentence(message: str, see: str | None = None) -> str:
    r"""Boils a message of jsonargparse down to where, what and how to fix it.

    Args:
        message: as given to `ArgumentParser.error`; nested lists of what each type of a union did not like.
        see: where the options are listed; None for those of `minirec fit`.

    Example:
        >>> one_sentence('Parser key "trainer.max_epochs": Expected a <class \'int\'>. Got value: many')
        'trainer.max_epochs: expected int, got many: see `minirec fit --help`'
    """
    keys: list[str] = []
    reasons: list[str] = []
    for line in re.sub(r"(class_path '[^']+'):\n\s*", r"\1: ", message).split("\n"):
        text = line.strip().removeprefix("- ")
        while match := re.match(r"(?:- )?Parser key \"([^\"]+)\":\s*", text):
            keys.append(match[1])
            text = text[match.end() :]
        if text and not _NOISE.match(text):
            reasons.append(_plain(text))
    got = next((value for groups in _GOT.findall(message) for value in groups if value), "")
    where = ".".join(dict.fromkeys(keys))
    if (wrong := what_is_wrong(message)) is not None:
        return f"{where + ': ' if where else ''}{wrong}"
    if unknown := next((r for r in reasons if r.startswith("unknown option ")), None):
        option = ".".join([*([where] if where else []), unknown.removeprefix("unknown option ")])
        return f"unknown option {option}: {see or where_options_are(where)}"
    what = " or ".join(dict.fromkeys(reasons)).replace(" or expected ", " or ") or "the value is not accepted"
    value = f", got {got[:80]}" if got and what.startswith("expected ") and len(got) < 200 else ""
    return f"{where + ': ' if where else ''}{what}{value}: {see or where_options_are(where)}"


def sentence_of(error: BaseException) -> str:
    """The sentence of an InputError that a parser has wrapped, else the error's own message as one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return one_sentence(str(error))


def _plain(text: str) -> str:
    text = re.sub(r"\.? Got value: .*", "", text)
    text = re.sub(r"^Type .* expects a function or a callable class: ", "", text)
    text = re.sub(r"^Option '(.*)' is not accepted$", r"unknown option \1", text)
    text = re.sub(r"^Subcommand '.*' does not accept option '(.*)'$", r"unknown option \1", text)
    text = re.sub(r"^unrecognized arguments: --([^\s=]+).*", r"unknown option \1", text)
    text = re.sub(r"module '([\w.]+)' has no attribute '(\w+)'", _with_nearest_name, text)
    text = re.sub(r"^Expected a dot import path string: (\w+)$", _with_nearest_class, text)
    text = re.sub(r"^Expected a typing\.Literal\[(.*)\]$", r"expected one of \1", text)
    text = re.sub(r"^Expected an? (?:<class '(?:\w+\.)*(\w+)'>|(.*))$", r"expected \1\2", text)
    return text.removesuffix(".")


def _with_nearest_name(said: re.Match[str]) -> str:
    """The name of a module that is nearest to one that it does not have."""
    module = sys.modules.get(said[1])
    inside = [part.name for part in iter_modules(getattr(module, "__path__", []))]
    return said[0] + did_you_mean(said[2], [*getattr(module, "__all__", ()), *dir(module), *inside])


def _with_nearest_class(said: re.Match[str]) -> str:
    """The shipped class whose name is nearest to one without a module."""
    names = [path.rpartition(".")[2] for path in option_list()["classes"]]
    return f"there is no class '{said[1]}'{did_you_mean(said[1], names)}"


def where_options_are(option: str, command: str = "fit") -> str:
    """Says which command lists an option."""
    top = option.split(".")[0]
    if top == "selection":
        return "see `minirec fit --selection.help=minirec_pl.callbacks.MiniRec`"
    of_class = "." in option and top in ("model", "data") and command != "data describe"
    return f"see `minirec {command} --{top}.help`" if of_class else f"see `minirec {command} --help`"


class CommentFormatter(DefaultHelpFormatter):
    """An option's help on one line, as `--print_config=comments` writes it above the option."""

    def _expand_help(self, action: Action) -> str:
        given, action.help = action.help, first_sentences(action.help or "")
        try:
            text, subclasses, _ = super()._expand_help(action).partition(", known subclasses: ")
        finally:
            action.help = given
        return " ".join(f"{text})".split() if subclasses else text.split())


def first_sentences(text: str) -> str:
    """The first sentence of a docstring and those after it that fit on its line, with YAML's word for None.

    Args:
        text: what a docstring says of an option.

    Example:
        >>> first_sentences("one weight per reward; None weighs   each with 1.")
        'One weight per reward; null weighs each with 1.'
    """
    line, *others = _SENTENCE_END.split(re.sub(r"\bNone\b", "null", " ".join(text.split())))
    for sentence in others:
        if len(line) + len(sentence) >= _COMMENT_LENGTH:
            break
        line = f"{line} {sentence}"
    return line[:1].upper() + line[1:]


FIT_KEYS = "a config is a mapping with the keys model, data and trainer"


def check_yaml(path: Path, expected: str = FIT_KEYS) -> None:
    """Refuses a config file that is missing or is not a YAML mapping.

    Args:
        path: of the file.
        expected: what such a file holds, in words.

    Raises:
        InputError: naming file, line and column.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        shipped = not path.is_absolute() and (shipped_configs().parent / path).is_file()
        fix = "run `minirec init`, which writes the shipped configs here" if shipped else "give --config a YAML file"
        raise InputError(f"the config '{path}' cannot be read ({reason}): {fix}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{where} is not valid YAML ({reason}): fix it there") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a mapping: {expected}")
