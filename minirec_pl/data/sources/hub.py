"""Hugging Face datasets: by hub id, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.sources.assemble import PARTS, Samples, from_interactions, from_sequences
from minirec_pl.data.sources.tables import Table, read_table
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
        items: Split that holds the items (``item_info``), or a CSV or parquet file; None takes the items of the
            data.
        columns: Names of columns in the data that differ from the library's: ``{user_id: customer, item_id: sku}``.
        item_columns: Names of columns of the items that differ from the library's.
        item_text: Columns of the items that make up the text encoders read, joined by ", ".

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
        frames = [splits[name].to_pandas() for name in wanted]
        if len(wanted) > 1 and PARTS.keys() >= {*wanted} and not {Columns.SPLIT} & {*frames[0], *self.columns}:
            frames = [frame.assign(split=name) for frame, name in zip(frames, wanted, strict=True)]
        frame = pd.concat(frames, ignore_index=True)
        named = {*frame, *self.columns}
        kind = (Columns.HISTORY_ITEM_ID,) if Columns.HISTORY_ITEM_ID in named else (Columns.TIMESTAMP,)
        table = Table(self.name_or_folder, frame).select(self.columns, (Columns.USER_ID, Columns.ITEM_ID, *kind))
        assemble = from_sequences if Columns.HISTORY_ITEM_ID in named else from_interactions
        return assemble(table, self._items(splits), self.item_text)

    def _items(self, splits: Mapping[str, Any]) -> Table | None:
        if self.items is None:
            return None
        if self.items in splits:
            table = Table(f"{self.name_or_folder} ({self.items})", splits[self.items].to_pandas())
        elif Path(self.items).suffix:
            table = read_table(Path(self.items))
        else:
            raise InputError(
                f"items={self.items!r} is neither a split of {self.name_or_folder} ({', '.join(splits)}) nor a file: "
                "name one of them"
            )
        return table.select(self.item_columns, (Columns.ITEM_ID,))

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
