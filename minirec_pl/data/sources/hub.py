"""Hugging Face datasets: by hub id, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.sources.assemble import PARTS, OnMissing, Samples, from_interactions, from_sequences, read_items
from minirec_pl.data.sources.tables import Table
from minirec_pl.utils.errors import InputError


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face dataset of interactions, or of ready-made sequences if it has a column history_item_id.

    No code of a dataset is ever run. Faults are treated as in :class:`InteractionTable` and :class:`Sequences`. Splits
    named train, valid, validation or test become the column ``split`` (for ``split: given``) where there is none.

    Args:
        name_or_folder: Hub id (``owner/name``) or folder.
        config: Configuration of a hub dataset that has several; None for the only one.
        split: Split to read; None for all of them, in their order, but not ``items``.
        items: Split that holds the items (``item_info``), or a file of another table; None takes the items of the
            data.
        columns: Names of columns in the data that differ from the library's: ``{user_id: customer, item_id: sku}``.
        item_columns: Names of columns of the items that differ from the library's.
        item_text: Columns of the items that make up the text encoders read, joined by ", ".
        item_separator: What separates the values of a file in ``items``; None takes the one that its header holds most
            often.
        item_encoding: Of a file in ``items``, such as ``cp1252``; None takes what its byte order mark says, else UTF-8.
        on_missing: Drop rows without an id or time and count them, or raise an ``error``.

    Example:
        >>> HubDataset("data/cds", items="item_info").read()  # doctest: +SKIP
    """

    name_or_folder: str
    config: str | None = None
    split: str | None = None
    items: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_columns: Mapping[str, str] = field(default_factory=dict)
    item_text: Sequence[str] = (Columns.TITLE,)
    item_separator: str | None = None
    item_encoding: str | None = None
    on_missing: OnMissing = "drop"

    def read(self) -> Samples:
        """Reads the dataset, from the hub's cache where it is there already.

        Raises:
            InputError: It cannot be loaded, has no such split, or something in it cannot be fixed; names split and row.
        """
        splits = self._load()
        wanted = [name for name in splits if name != self.items] if self.split is None else [self.split]
        for name in wanted:
            if name not in splits:
                raise InputError(f"{self.name_or_folder} has no split {name!r}: give one of {', '.join(splits)}")
        frames = [_frame(splits[name]) for name in wanted]
        if len(wanted) > 1 and PARTS.keys() >= {*wanted} and not {Columns.SPLIT} & {*frames[0], *self.columns}:
            frames = [frame.assign(split=name) for frame, name in zip(frames, wanted, strict=True)]
        frame = pd.concat(frames, ignore_index=True)
        named = {*frame, *self.columns}
        kind = (Columns.HISTORY_ITEM_ID,) if Columns.HISTORY_ITEM_ID in named else (Columns.TIMESTAMP,)
        table = Table(self.name_or_folder, frame).select(self.columns, (Columns.USER_ID, Columns.ITEM_ID, *kind))
        assemble = from_sequences if Columns.HISTORY_ITEM_ID in named else from_interactions
        return assemble(table, self._items(splits), self.item_text, self.on_missing)

    def _items(self, splits: Mapping[str, Any]) -> Table | None:
        if self.items not in splits and self.items is not None and Path(self.items).suffix:
            return read_items(self.items, self.item_columns, self.item_separator, self.item_encoding)
        if self.items is None:
            return None
        if self.items not in splits:
            raise InputError(
                f"items={self.items!r} is neither a split of {self.name_or_folder} ({', '.join(splits)}) nor a file: "
                "name one of them"
            )
        table = Table(f"{self.name_or_folder} ({self.items})", _frame(splits[self.items]))
        return table.select(self.item_columns, (Columns.ITEM_ID,), "item_columns")

    def _load(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError:
            raise InputError("HubDataset needs the library datasets: pip install 'minirec-pl[hub]'") from None
        try:
            if Path(self.name_or_folder).is_dir():
                loaded = datasets.load_from_disk(self.name_or_folder)
            else:
                loaded = datasets.load_dataset(self.name_or_folder, self.config)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the dataset {self.name_or_folder!r} cannot be loaded ({reason}): on a machine that reaches the hub "
                "run datasets.load_dataset(...).save_to_disk(FOLDER), copy the folder here and set name_or_folder to it"
            ) from error
        return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "data"): loaded}


def _frame(split: Any) -> pd.DataFrame:
    """A split as a frame; whole numbers stay whole beside missing ones, so that long ids keep all their digits."""
    frame: pd.DataFrame = split.with_format("arrow")[:].to_pandas(integer_object_nulls=True)
    return frame
