"""`minirec data describe`: what a data set holds, before any model sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.statistics import Facts, facts_of, notes_on, token_facts
from minirec_pl.policy.catalogue_text import encode_catalogue
from minirec_pl.sentences import check_yaml
from minirec_pl.utils.errors import InputError

PIPE_WIDTH = 120


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise InputError(f"{' '.join(message.split())}; see `minirec data describe --help`") from ex


def parser() -> ArgumentParser:
    """The options of `minirec data describe`."""
    made = _Parser(
        prog="minirec data describe",
        description="Reads the data of a config and prints counts, sparsity, parts, history lengths, cold items, and "
        "what was dropped or mended and why; with a tokenizer, prompt lengths in tokens.",
    )
    made.add_argument("--config", required=True, help="YAML file of `minirec fit`, or one with its section data alone")
    made.add_argument("--tokenizer", default=None, help="folder or hub name of a tokenizer")
    made.add_argument("--data", type=LightningDataModule, help="overrides, as in `minirec fit`: --data.split=given")
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec data describe`.

    Args:
        arguments: what follows `minirec data describe`.

    Raises:
        InputError: for bad input.
    """
    made = parser()
    config = _config_of(arguments)
    section = [] if config is None else [f"--data={json.dumps(_data_section(config))}"]
    options = made.instantiate_classes(made.parse_args([*section, *arguments]))
    data = options.data
    if not isinstance(data, RecDataModule):
        raise InputError(f"{options.config}: data is a {type(data).__name__}; describe reads a RecDataModule.")
    data.setup()
    facts = facts_of(data)
    if options.tokenizer is not None:
        tokenizer = _tokenizer(options.tokenizer)
        facts |= token_facts(data, lambda texts, **_: {"input_ids": encode_catalogue(tokenizer, texts)})
    _show(Console() if Console().is_terminal else Console(width=PIPE_WIDTH), facts, notes_on(data))


def _config_of(arguments: Sequence[str]) -> Path | None:
    for word, following in pairwise([*arguments, ""]):
        if word == "--config":
            return Path(following)
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _data_section(path: Path) -> Any:
    check_yaml(path)
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
    if not isinstance(data, dict):
        raise InputError(f"{path} has no section data; give the config of `minirec fit`.")
    return data


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"no tokenizer in {name!r} ({reason}); give a folder with a tokenizer.json, or a name of the hub."
        ) from error


def _show(console: Console, facts: Facts, notes: Sequence[str]) -> None:
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", no_wrap=True)
    for section, rows in facts.items():
        table.add_row(f"[bold]{escape(section)}[/]", "")
        for what, value in rows.items():
            table.add_row(f"  {escape(what)}", value)
        table.add_section()
    console.print(table)
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True, highlight=False)
