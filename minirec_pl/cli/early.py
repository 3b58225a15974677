"""What is wrong with a command line, as far as that can be told without importing torch."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from minirec_pl.cli.arguments import class_of, configs_first, values_of
from minirec_pl.cli.known import FLAGS, did_you_mean, is_known, option_list, options_of
from minirec_pl.cli.runs import in_working_dir
from minirec_pl.cli.sentences import FIT_KEYS, check_yaml, where_options_are
from minirec_pl.data.fetch import atomic_file
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint
from minirec_pl.utils.run_folder import SIDE_FILE, policy_file

INPUTS = {  # options that name what is read, by command, and what is said where there is nothing
    "export": {"policy": f"there is no policy in '{{}}' ({SIDE_FILE} is missing): give the folder `policy` of a run"},
    "predict": dict.fromkeys(("history", "candidates"), "{} does not exist: check the path or put the file there"),
    "report": {"folders": "there is no run folder '{}': give a folder that `minirec fit` or `quickstart` left"},
    "select": {
        "signals": "there are no signals at {}: give the file that `minirec score` or a run wrote",
        "embeddings": "there are no vectors at {}: give a .npy array with a row per sample",
        "gradients": "there are no vectors at {}: give a .npy array with a row per sample",
        "ids": "there are no ids at {}: give the sample_id of each row as .npy or as text, one per line",
        "samples": "there is no table of samples at {}: leave out --samples or give a parquet or CSV file",
    },
}
_INSIDE = ("init_args", "dict_kwargs")


def check_command_line(command: str, words: Sequence[str]) -> None:
    """Refuses unknown options, in words and configs, and files that are missing.

    What it lets through can still be wrong: options of classes outside minirec_pl, and the type of a value.

    Args:
        command: one that `is_known`.
        words: that follow the command.

    Raises:
        InputError: naming the option, or the file and the line.
    """
    given = _Given(command)
    with given.taking(words):
        if not any(word.startswith("--print_config") or ".help" in word for word in words):
            given.check_required()
            given.check_files()


def with_nearest_option(sentence: str, command: str, words: Sequence[str]) -> str:
    """Adds the nearest option to the sentence on one that the class of a command line or its configs does not have.

    The class can be any that is importable, such as those of torch and Lightning and those of the user.
    """
    unknown = re.match(r"unknown option (\w[\w.]*)\.(\w+):", sentence)
    if unknown is None or not is_known(command):
        return sentence
    given = _Given(command)
    with contextlib.suppress(InputError, ImportError, AttributeError, TypeError, ValueError):
        with given.taking(words):
            names = inspect.signature(class_of(given.classes[unknown[1]])).parameters
        near = did_you_mean(unknown[0][15:-1], [f"{unknown[1]}.{name}" for name in names])
        return unknown[0][:-1] + near + sentence[unknown.end() - 1 :]
    return sentence


class _Given:
    """The classes and values that words and configs give so far, by option: `model.policy`, without `init_args`."""

    def __init__(self, command: str) -> None:
        self.command, self.options = command, options_of(command)
        self.classes: dict[str, str] = {}
        self.values: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def taking(self, words: Sequence[str]) -> Iterator[None]:
        """Takes the configs of a command line, then its options; works in the folder that its paths are relative to."""
        own = contextlib.nullcontext(configs_first([self.command, *words]))
        with in_working_dir([self.command, *words]) if "model" in self.options else own as taken:
            for config in values_of(taken, "--config", "-c"):
                if self.command != "compare":  # which reads its study itself
                    check_yaml(Path(config), FIT_KEYS)
                    self.add_file(Path(config))
            self.add_words(taken[1:])
            yield

    def add_words(self, words: Sequence[str]) -> None:
        """Takes the options of a command line and what they are given."""
        positional = [row["key"] for name, row in self.options.items() if not row["names"]]
        for name, value in self._pairs(words):
            if name is None:
                if not positional:
                    see = f"see `minirec {self.command} --help`"
                    raise InputError(f"'{value}' follows no option: give a config as --config FILE, or {see}")
                self.values.setdefault(positional[0], []).append(str(value))
                continue
            keys = name.split(".")
            self._check(keys, "")
            if value is None:
                continue
            try:
                node = yaml.compose(value) if value.startswith("{") else None
            except yaml.YAMLError:
                continue
            self._add(keys, node or yaml.ScalarNode("tag:yaml.org,2002:str", value), "")

    def _pairs(self, words: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
        """Each option with its value; a value alone has no option, and an option may have no value."""
        left = list(words)
        while left:
            word = left.pop(0)
            if not word.startswith("-") or word == "-":
                yield None, word
                continue
            option, equals, value = word.partition("=")
            name = option.lstrip("-")
            row = self.options.get(name, {})
            alone = row.get("nargs") == FLAGS or name == "print_config" or not option.startswith("--")
            optional = row.get("nargs") == "?" or name.endswith(".help")
            if option == "-c":
                alone, name = False, "config"
            if equals:
                yield name, value
            elif alone or not left or (optional and left[0].startswith("-")):
                if option.startswith("--"):
                    yield name, None
            else:
                yield name, left.pop(0)

    def add_file(self, path: Path) -> None:
        """Takes the keys of a YAML file that `check_yaml` lets through."""
        content = yaml.compose(path.read_text(encoding="utf-8"))
        known = self.options if self.command == "data describe" else None
        for key, value in _items(content):
            if known is None or key.value in known:
                self._check(key.value.split("."), _place(path, key))
                self._add(key.value.split("."), value, str(path))

    def _add(self, keys: list[str], node: yaml.Node, path: str) -> None:
        """Takes what is under some keys."""
        at = _option(keys)
        if isinstance(node, yaml.ScalarNode):
            self.values[at] = [node.value]
            self._name(at, node.value)
        elif isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                if isinstance(entry, yaml.MappingNode):
                    self._add(keys, entry, path)
        else:
            items = {key.value: value for key, value in _items(node)}
            if isinstance(items.get("class_path"), yaml.ScalarNode):
                self._name(at, items["class_path"].value)
            for key, value in _items(node):
                below = [*keys, *key.value.split(".")]
                self._check(below, _place(Path(path), key) if path else "")
                if key.value != "class_path":
                    self._add(below, value, path)

    def _name(self, at: str, path: str) -> None:
        """Notes the class of an option; what another class was given there is void."""
        if self.classes.get(at) != path:
            self.classes = {name: kind for name, kind in self.classes.items() if not name.startswith(f"{at}.")}
            self.values = {name: given for name, given in self.values.items() if not name.startswith(f"{at}.")}
            self.classes[at] = path

    def _check(self, keys: list[str], place: str) -> None:
        """Refuses keys that are no option of the command, nor of the classes that are named."""
        keys = [key.rstrip("+") for key in keys]
        name = ".".join(keys)
        for length in range(len(keys), 0, -1):
            option = ".".join(keys[:length])
            if option in self.options:
                break
        else:
            raise self._unknown(name, self._names(), place)
        rest = keys[length:]
        below = [other for other in self.options if other.startswith(f"{option}.") and other != f"{option}.help"]
        if rest and below:
            raise self._unknown(name, below, place)
        self._check_class(option, self.options[option], rest, place)

    def _check_class(self, at: str, row: Any, rest: list[str], place: str) -> None:
        rest = rest[1:] if rest[:1] == ["init_args"] else rest
        options = option_list()["classes"].get(self.classes.get(at, row.get("class")))
        if not rest or options is None or rest[0] in ("class_path", "dict_kwargs", "help"):
            return
        name = rest[0]
        if name not in options:
            raise self._unknown(f"{at}.{name}", [f"{at}.{other}" for other in options], place)
        self._check_class(f"{at}.{name}", options[name], rest[1:], place)

    def _names(self) -> list[str]:
        """The options of the command and of the classes that are named, those that are asked for most often first."""
        classes = option_list()["classes"]
        inner = [f"{at}.{name}" for at, path in self.classes.items() for name in classes.get(path, ())]
        return [*self.options, *inner]

    def _unknown(self, name: str, names: Sequence[str], place: str) -> InputError:
        near = did_you_mean(name, [other for other in names if not other.endswith(".help")])
        see = where_options_are(name, self.command)
        return InputError(f"{place}unknown option {name}{near}: {see}")

    def check_required(self) -> None:
        """Refuses a command line that lacks what the command needs."""
        given = {name.partition(".")[0] for name in [*self.values, *self.classes]}
        for name, row in self.options.items():
            if row.get("required") and name not in given:
                what = f"--{name}" if row["names"] else row.get("metavar", name)
                config = ": give a YAML file with --config, or " if name in ("model", "data") else ": "
                raise InputError(f"{what} is missing{config}see `minirec {self.command} --help`")

    def check_files(self) -> None:
        """Refuses files to read that are not there.

        `minirec check` looks for them itself, and lists them with all else that it finds.
        """
        for name, sentence in INPUTS.get(self.command, {}).items():
            for path in self.values.get(name, ()):
                if path != "null" and not Path(path).exists():
                    raise InputError(sentence.format(path))
        if self.command == "check":
            return
        for path in self.values.get("ckpt_path", ()):
            if path not in ("best", "last", "hpc", "null"):
                check_checkpoint(Path(path))
        pretrained = self._value("model.policy.pretrained", None)
        if pretrained is not None and self.classes.get("model.policy", "").startswith("minirec_pl."):
            policy_file(Path(pretrained))
        if self.classes.get("data") == "minirec_pl.RecDataModule" and "data.source" not in self.classes:
            atomic_file(Path(self._value("data.path", "data")), self._value("data.dataset", "ml-100k"))

    def _value(self, name: str, default: Any) -> Any:
        given = self.values.get(name, [default])[-1]
        return default if given == "null" else given


def _items(node: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys of a mapping that are words, and their values."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            yield key, value


def _option(keys: Sequence[str]) -> str:
    """The option that some keys belong to."""
    return ".".join(key.rstrip("+") for key in keys if key not in _INSIDE)


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}: "
