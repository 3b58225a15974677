"""`minirec data describe`: what a data set holds, before any model sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch import LightningDataModule
from rich.markup import escape
from rich.table import Table

from minirec_pl.cli.arguments import without_types
from minirec_pl.cli.sentences import check_yaml
from minirec_pl.cli.terminal import CommandParser, console
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.samples import Catalogue, IntArray
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.splits import LEAVE_ONE_OUT_LEAK, random_part
from minirec_pl.policy.catalogue_text import encode_catalogue
from minirec_pl.utils.errors import InputError

PromptText = Callable[[Catalogue, IntArray], str]
Facts = dict[str, dict[str, str]]
QUANTILES = (0.1, 0.5, 0.9, 1.0)
PROMPTS = 500


def parser() -> CommandParser:
    """Makes the parser of `minirec data describe`."""
    made = CommandParser(
        prog="minirec data describe",
        description="Reads the data of a config and prints counts, sparsity, parts, history lengths, cold items, and "
        "what was dropped or fixed and why; with a tokenizer, prompt lengths in tokens.",
    )
    made.add_argument("--config", required=True, help="YAML file of `minirec fit`, or one with its section data alone")
    made.add_argument("--tokenizer", default=None, help="folder or hub name of a tokenizer")
    data = made.add_argument(
        "--data", type=LightningDataModule, help="overrides, as in `minirec fit`: --data.split=given"
    )
    without_types(data)
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec data describe` on the words that follow it."""
    made = parser()
    config = _config_of(arguments)
    section = [] if config is None else [f"--data={json.dumps(_data_section(config))}"]
    options = made.instantiate_classes(made.parse_args([*section, *arguments]))
    data = options.data
    if not isinstance(data, RecDataModule):
        raise InputError(f"{options.config}: data is a {type(data).__name__}: set it to a RecDataModule")
    data.setup()
    facts = facts_of(data)
    if options.tokenizer is not None:
        tokenizer = _tokenizer(options.tokenizer)
        facts |= token_facts(data, lambda texts, **_: {"input_ids": encode_catalogue(tokenizer, texts)})
    _show(facts, notes_on(data))


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
        raise InputError(f"{path} has no section data: give the config of `minirec fit`")
    return data


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"no tokenizer in {name!r} ({reason}): give a folder with a tokenizer.json, or a name of the hub"
        ) from error


def _show(facts: Facts, notes: Sequence[str]) -> None:
    screen = console()
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", no_wrap=True)
    for section, rows in facts.items():
        table.add_row(f"[bold]{escape(section)}[/]", "")
        for what, value in rows.items():
            table.add_row(f"  {escape(what)}", value)
        table.add_section()
    screen.print(table)
    for note in notes:
        screen.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True, highlight=False)


def history_text(catalogue: Catalogue, history: IntArray) -> str:
    """Joins the items' texts, one per line: the part of a prompt whose length depends on the data."""
    return "\n".join(catalogue.texts[item] for item in history)


def facts_of(data: RecDataModule) -> Facts:
    """Measures counts, parts, history lengths, cold items, and what was dropped or fixed.

    Args:
        data: After ``setup``.

    Returns:
        By section, what was measured and its value, both for printing.
    """
    table, counts = data.table, data.describe()
    pairs = int(table.item_counts(np.arange(len(table))).sum())
    if not isinstance(table, SequenceTable):
        pairs = len(table.distinct_item)
    used = {"warm": data.warm_ids, "pool": data.pool_ids, "validation": data.val_ids, "test": data.test_ids}
    served = np.concatenate(list(used.values()))
    per_user = np.bincount(table.user, minlength=len(table.user_ids))
    ever = table.item_counts(np.arange(len(table)))
    target = table.item[data.test_ids]
    cold = data.item_popularity[target] == 0
    trained = np.isin(table.user[data.test_ids], table.user[np.concatenate([data.parts.warm, data.parts.pool])])
    return {
        "data": {
            "users": _count(counts["users"]),
            "items": _count(counts["items"]),
            "sequences" if isinstance(table, SequenceTable) else "interactions": _count(counts["interactions"]),
            "sparsity, the share of user-item pairs without interaction": (
                f"{1 - pairs / (counts['users'] * counts['items']):.4%}"
            ),
            "users with a single row": _count(int((per_user == 1).sum())),
            "items that nobody has": _count(int((ever == 0).sum())),
        },
        "rows: samples that are used": {
            name: f"{counts[f'{name}_rows']:,}: {len(ids):,}" for name, ids in used.items()
        },
        "history length, items": {
            **_quantiles(table.n_earlier[served]),
            f"longer than history_window ({data.history_window})": _share(
                table.n_earlier[served] > data.history_window
            ),
        },
        "cold": {
            "test samples whose item is never in train": _share(cold),
            "different items among these": _count(len(np.unique(target[cold]))),
            "test samples of users that are not in train": _share(~trained),
        },
        "not served, dropped or fixed": {
            "no earlier interaction: history only": _count(counts["no_history"]),
            "the user had the item before: history only": _count(counts["repeats"]),
            **{what: _count(count) for what, count in data.report.items() if count},
        },
    }


def token_facts(data: RecDataModule, tokenizer: Any, prompt: PromptText = history_text) -> Facts:
    """Measures lengths in tokens of item texts, and of the prompts of at most 500 random samples.

    Args:
        data: After ``setup``.
        tokenizer: Called as one of transformers is.
        prompt: Makes the text of a prompt from the catalogue and a history.

    Returns:
        As of :func:`facts_of`.
    """
    ids = random_part(np.sort(np.concatenate([data.warm_ids, data.pool_ids, data.val_ids, data.test_ids])), PROMPTS, 0)
    prompts = [prompt(data.catalogue, data.table.history(int(i), data.history_window)) for i in ids]
    return {
        "item text, tokens": _quantiles(_lengths(tokenizer, data.catalogue.texts)),
        "history in a prompt, tokens": _quantiles(_lengths(tokenizer, prompts)),
    }


def notes_on(data: RecDataModule) -> list[str]:
    """Lists what a reader of results should know of the split."""
    return [LEAVE_ONE_OUT_LEAK] if data.split_by == "leave_one_out" else []


def _lengths(tokenizer: Any, texts: Sequence[str]) -> IntArray:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([len(ids) for ids in encoded], dtype=np.int64)


def _quantiles(values: IntArray) -> dict[str, str]:
    names = ("shortest tenth up to", "median", "nine tenths up to", "longest")
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return {name: f"{int(value):,}" for name, value in zip(names, found, strict=True)}


def _count(value: int) -> str:
    return f"{value:,}"


def _share(mask: Any) -> str:
    return f"{int(mask.sum()):,} ({mask.mean():.1%})"
