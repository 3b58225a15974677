"""Ready-made sequences: a row per sample with its history, and a table of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from minirec_pl.data.columns import Columns
from minirec_pl.data.sources.assemble import OnMissing, Samples, from_sequences, read_items
from minirec_pl.data.sources.files import TextFormat, read_table

SEQUENCE_COLUMNS: Final = (Columns.USER_ID, Columns.HISTORY_ITEM_ID, Columns.ITEM_ID)


@dataclass(frozen=True)
class Sequences:
    """Ready-made sequences, a row per sample with its history, and a table of items: parquet or JSON lines.

    Without a column timestamp the row order is the time order, and the ages of a history are unknown (NaN). A sample
    masks the items of its own history at evaluation; history items that are not in the item table go, and a row whose
    target is not. Other faults are treated as in :class:`InteractionTable`.

    Args:
        sequences: File with user_id, history_item_id (lists, oldest first) and item_id, perhaps timestamp, rating,
            split, history_timestamp and history_rating (lists as long as the history), and others that rewards ask for.
        items: File with item_id, perhaps title and others, in the order of the catalogue; None takes the items by
            first appearance, without titles.
        columns: Names of columns in ``sequences`` that differ from the library's: ``{user_id: customer}``.
        item_columns: Names of columns in ``items`` that differ from the library's.
        item_text: Columns of ``items`` that make up the text encoders read, joined by ", ".
        encoding: Of JSON lines, such as ``cp1252``; None takes what the byte order mark says, else UTF-8.
        item_separator: What separates the values of ``items``; None takes the one that its header holds most often.
        item_encoding: As ``encoding``, of ``items``.
        on_missing: Drop rows without an id or time and count them, or raise an ``error``;
            of a history only the missing item goes.

    Example:
        >>> Sequences("sequences.parquet", "items.parquet").read()  # doctest: +SKIP
    """

    sequences: str
    items: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_columns: Mapping[str, str] = field(default_factory=dict)
    item_text: Sequence[str] = (Columns.TITLE,)
    encoding: str | None = None
    item_separator: str | None = None
    item_encoding: str | None = None
    on_missing: OnMissing = "drop"

    def read(self) -> Samples:
        """Reads the files.

        Raises:
            InputError: A file is missing or something in it cannot be fixed; names the row.
        """
        rows = read_table(Path(self.sequences), TextFormat(encoding=self.encoding))
        rows = rows.select(self.columns, SEQUENCE_COLUMNS)
        items = read_items(self.items, self.item_columns, self.item_separator, self.item_encoding)
        return from_sequences(rows, items, self.item_text, self.on_missing)
