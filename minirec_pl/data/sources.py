"""Where samples come from; each source is a class that a YAML file names by its class_path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from minirec_pl.data.amazon import AmazonReviews2023
from minirec_pl.data.assemble import Report, Samples, Source, from_interactions, from_sequences
from minirec_pl.data.atomic import read_atomic
from minirec_pl.data.columns import Columns
from minirec_pl.data.hub import HubDataset
from minirec_pl.data.samples import Catalogue, SampleTable
from minirec_pl.data.tables import Table, read_table
from minirec_pl.utils.errors import InputError

__all__ = ["AmazonReviews2023", "AtomicFiles", "HubDataset", "InteractionTable", "Samples", "Sequences", "Source"]

TITLE_COLUMNS: Final = {"movie_title": Columns.TITLE}
INTERACTION_COLUMNS: Final = (Columns.USER_ID, Columns.ITEM_ID, Columns.TIMESTAMP)
SEQUENCE_COLUMNS: Final = (Columns.USER_ID, Columns.HISTORY_ITEM_ID, Columns.ITEM_ID)


@dataclass(frozen=True)
class AtomicFiles:
    """RecBole atomic files: ``<path>/<dataset>/<dataset>.inter`` and, where they exist, ``.item`` and ``.user``.

    The catalogue is the ``.item`` file in its order, else the items by first appearance. An item's text is
    ``title (release_year), class`` as far as the file has these columns. Nothing is dropped: such files are made by
    programs, so what does not fit (an item or user that is not in its file, an item twice) is refused.

    Args:
        path: Folder that holds a folder per dataset.
        dataset: Name of the dataset's folder and files.

    Example:
        >>> AtomicFiles("data", "ml-100k").read().catalogue.texts[0]  # doctest: +SKIP
        "Toy Story (1995), Animation, Children's, Comedy"
    """

    path: str
    dataset: str = "ml-100k"

    def read(self) -> Samples:
        """Read the files.

        Raises:
            InputError: A file is missing or wrong; names the line.
        """
        folder = Path(self.path, self.dataset)
        interactions = folder / f"{self.dataset}.inter"
        if not interactions.is_file():
            fetch = f"run 'minirec fetch {self.dataset} --to {self.path}'"
            other = f"put {self.dataset}.inter and {self.dataset}.item (RecBole atomic files) there"
            raise InputError(f"{interactions} is missing; {fetch if self.dataset == 'ml-100k' else other}.")
        frame = read_atomic(interactions, required=INTERACTION_COLUMNS)
        if frame[Columns.TIMESTAMP].dtype != np.float64:
            raise InputError(
                f"{interactions}, line 1, column timestamp: it must be 'timestamp:float', in unix seconds."
            )
        if Columns.RATING in frame and frame[Columns.RATING].dtype != np.float64:
            frame = frame.drop(columns=Columns.RATING)
        catalogue = _atomic_catalogue(folder / f"{self.dataset}.item", frame[Columns.ITEM_ID].tolist())
        _check_users(folder / f"{self.dataset}.user", interactions, frame[Columns.USER_ID].tolist())
        table = SampleTable.from_interactions(frame, catalogue, source=str(interactions))
        return Samples(table, catalogue, str(interactions), Report())


@dataclass(frozen=True)
class InteractionTable:
    """A log of interactions, a row each, and a table of items: CSV or parquet.

    Rows come in any order. Ids are text: 12, 12.0 and "12.0" are "12", but "007" stays itself. Times are dates or unix
    times (their unit follows from their size). What a real export has wrong is mended and counted, see
    :attr:`RecDataModule.report`: rows that repeat user, item and time (the first stays), items that are not in the item
    table (the interaction goes), missing ratings (unknown) and titles (the id stands in). What cannot be mended is one
    sentence with file and line: an empty id, a rating or time that is none, text that is not UTF-8.

    Args:
        interactions: File with user_id, item_id and timestamp, perhaps rating and split; ``.csv``, ``.tsv`` (either
            also ``.gz``) or ``.parquet``.
        items: File with item_id, perhaps title and others, in the order of the catalogue; None: the items of the log
            by first appearance, without titles.
        columns: Names in ``interactions`` that differ from the library's: ``{user_id: customer, item_id: sku}``.
        item_columns: The same for ``items``.
        item_text: Columns of ``items`` that make up the text encoders read, joined by ", ".

    Example:
        >>> InteractionTable("log.csv", "items.csv", columns={"user_id": "customer"}).read()  # doctest: +SKIP
    """

    interactions: str
    items: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_columns: Mapping[str, str] = field(default_factory=dict)
    item_text: Sequence[str] = (Columns.TITLE,)

    def read(self) -> Samples:
        """Read the files.

        Raises:
            InputError: A file is missing or something in it cannot be mended; names the line.
        """
        log = read_table(Path(self.interactions)).select(self.columns, INTERACTION_COLUMNS)
        return from_interactions(log, _item_table(self.items, self.item_columns), self.item_text)


@dataclass(frozen=True)
class Sequences:
    """Ready-made sequences, a row per sample with its history, and a table of items: parquet.

    Without a column timestamp the row order is the time order, and the ages of a history are unknown (NaN). A sample
    masks the items of its own history at evaluation; history items that are not in the item table go, and a row whose
    target is not. Other faults are treated as in :class:`InteractionTable`.

    Args:
        sequences: File with user_id, history_item_id (lists, oldest first) and item_id, perhaps timestamp, rating,
            split, and history_timestamp and history_rating (lists as long as the history).
        items: File with item_id, perhaps title and others, in the order of the catalogue; None: the items by first
            appearance, without titles.
        columns: Names in ``sequences`` that differ from the library's.
        item_columns: The same for ``items``.
        item_text: Columns of ``items`` that make up the text encoders read, joined by ", ".

    Example:
        >>> Sequences("sequences.parquet", "items.parquet").read()  # doctest: +SKIP
    """

    sequences: str
    items: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_columns: Mapping[str, str] = field(default_factory=dict)
    item_text: Sequence[str] = (Columns.TITLE,)

    def read(self) -> Samples:
        """Read the files.

        Raises:
            InputError: A file is missing or something in it cannot be mended; names the row.
        """
        rows = read_table(Path(self.sequences)).select(self.columns, SEQUENCE_COLUMNS)
        return from_sequences(rows, _item_table(self.items, self.item_columns), self.item_text)


def _item_table(path: str | None, columns: Mapping[str, str]) -> Table | None:
    return None if path is None else read_table(Path(path)).select(columns, (Columns.ITEM_ID,))


def _atomic_catalogue(path: Path, interacted: list[str]) -> Catalogue:
    if not path.is_file():
        return Catalogue(list(dict.fromkeys(interacted)))
    items = read_atomic(path, TITLE_COLUMNS, required=(Columns.ITEM_ID,))
    twice = items[Columns.ITEM_ID].duplicated()
    if twice.any():
        row = int(np.argmax(twice))
        raise InputError(
            f"{path}, line {row + 2}: the item {items[Columns.ITEM_ID].iloc[row]!r} comes twice; keep one row."
        )
    titles = items[Columns.TITLE].tolist() if Columns.TITLE in items else None
    return Catalogue(items[Columns.ITEM_ID].tolist(), titles, _atomic_texts(items) if titles else None)


def _atomic_texts(items: pd.DataFrame) -> list[str]:
    nothing = [""] * len(items)
    years = items["release_year"].astype(str).tolist() if "release_year" in items else nothing
    genres = items["class"].astype(str).tolist() if "class" in items else nothing
    return [
        ", ".join(filter(None, [f"{title} ({year})" if title and year else title, *genre.split()]))
        for title, year, genre in zip(items[Columns.TITLE].tolist(), years, genres, strict=True)
    ]


def _check_users(path: Path, interactions: Path, user_ids: list[str]) -> None:
    if not path.is_file():
        return
    known = set(read_atomic(path, required=(Columns.USER_ID,))[Columns.USER_ID])
    row = next((row for row, user_id in enumerate(user_ids) if user_id not in known), None)
    if row is not None:
        raise InputError(
            f"{interactions}, line {row + 2}: the user {user_ids[row]!r} is not in {path.name}; add it there or "
            "mend the order of the columns."
        )
