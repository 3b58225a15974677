"""The words of a `minirec` command line, before they are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint
from minirec_pl.utils.run_folder import CONFIG


def config_of_checkpoint(args: Sequence[str]) -> list[str]:
    """The config a run left beside its checkpoints, where only `--ckpt_path` is given.

    Raises:
        InputError: if there is none, or no checkpoint.
    """
    checkpoints = values_of(args, "--ckpt_path")
    if not checkpoints or values_of(args, "--config", "-c"):
        return []
    check_checkpoint(Path(checkpoints[-1]))
    config = Path(checkpoints[-1]).parent.parent / CONFIG
    if not config.is_file():
        raise InputError(f"there is no '{config}' beside the checkpoint: name the config of its run with --config")
    return ["--config", str(config)]


def configs_first(args: Sequence[str]) -> list[str]:
    """Moves the config files before all other options, so that none of their keys overrides what the user typed."""
    configs: list[str] = []
    others: list[str] = []
    words = iter(args[1:])
    for word in words:
        if word in ("--config", "-c"):
            configs += [word, *islice(words, 1)]
        else:
            (configs if word.startswith("--config=") else others).append(word)
    return [*args[:1], *configs, *others]


def values_of(args: Sequence[str], *options: str) -> list[str]:
    """What is given to an option, as `--option VALUE` or `--option=VALUE`."""
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    return [value for option, value in pairwise(words) if option in options]


def without_types(option: Any) -> None:
    """Lets the classes that an option names have parameters without a type, as those of `--model` and `--data` may.

    Args:
        option: what `add_argument` returned.
    """
    if hasattr(option, "sub_add_kwargs"):  # else it names no class
        option.sub_add_kwargs["fail_untyped"] = False


def class_of(class_path: str) -> Any:
    """The class that a config names."""
    place, _, name = class_path.rpartition(".")
    return getattr(import_module(place), name)
