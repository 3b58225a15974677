"""Interaction tables: a log of interactions, a row each, and a table of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minirec_pl.data.columns import Columns
from minirec_pl.data.sources.assemble import INTERACTION_COLUMNS, OnMissing, Samples, from_interactions, read_items
from minirec_pl.data.sources.files import TextFormat, read_table


@dataclass(frozen=True)
class InteractionTable:
    r"""A log of interactions, a row each, and a table of items: separated text, JSON lines or parquet.

    Rows come in any order. Ids are text: 12, 12.0 and "12.0" are "12", but "007" stays itself. Times are dates or unix
    times (their unit follows from their size). What a real export has wrong is fixed and counted, see
    :attr:`RecDataModule.report`: rows without an id or time (dropped), rows that repeat user, item and time (the first
    stays), items that are not in the item table (the interaction goes), missing ratings (unknown) and titles (the id
    stands in). What cannot be fixed is one sentence with file and line: a rating that is not a number, text in another
    encoding. Missing is a null, a NaN, and a text that is blank or, in any case, nan, NaT, none, null, <NA> or \N.

    Args:
        interactions: File with user_id, item_id and timestamp, perhaps rating, split and others that rewards ask for;
            text with a header (``.csv``, ``.tsv``, ``.dat``, ``.txt``), ``.jsonl`` (each also ``.gz``) or ``.parquet``.
        items: File with item_id, perhaps title and others, in the order of the catalogue; None takes the items of the
            log by first appearance, without titles.
        columns: Names of columns in ``interactions`` that differ from the library's: ``{user_id: customer, item_id:
            sku}``.
        item_columns: Names of columns in ``items`` that differ from the library's.
        item_text: Columns of ``items`` that make up the text encoders read, joined by ", ".
        separator: What separates the values of a text; None takes of tab, ``::``, ``;``, ``|`` and comma the one that
            the header holds most often.
        encoding: Of a text, such as ``cp1252``; None takes what its byte order mark says, else UTF-8.
        item_separator: As ``separator``, of ``items``.
        item_encoding: As ``encoding``, of ``items``.
        on_missing: Drop rows without an id or time and count them, or raise an ``error``.

    Example:
        >>> InteractionTable("log.csv", "items.csv", columns={"user_id": "customer"}).read()  # doctest: +SKIP
    """

    interactions: str
    items: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_columns: Mapping[str, str] = field(default_factory=dict)
    item_text: Sequence[str] = (Columns.TITLE,)
    separator: str | None = None
    encoding: str | None = None
    item_separator: str | None = None
    item_encoding: str | None = None
    on_missing: OnMissing = "drop"

    def read(self) -> Samples:
        """Reads the files.

        Raises:
            InputError: A file is missing or something in it cannot be fixed; names the line.
        """
        log = read_table(Path(self.interactions), TextFormat(self.separator, self.encoding))
        items = read_items(self.items, self.item_columns, self.item_separator, self.item_encoding)
        return from_interactions(log.select(self.columns, INTERACTION_COLUMNS), items, self.item_text, self.on_missing)
