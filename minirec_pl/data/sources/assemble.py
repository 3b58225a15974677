"""From tables as users have them to samples and a catalogue, counting what is dropped or fixed on the way."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.samples import BoolArray, Catalogue, FloatArray, IntArray, SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources.files import TextFormat, read_table
from minirec_pl.data.sources.tables import (
    Table,
    clean_text,
    flat_values,
    ids_of,
    in_seconds,
    is_missing,
    lengths_of,
    numbers_of,
    refuse_missing,
    times_of,
    unique_ids,
)
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.protocols import untyped

Faults = Counter[str]
OnMissing = Literal["drop", "error"]
T = TypeVar("T", bound=np.generic)
PARTS: Final = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


INTERACTION_COLUMNS: Final = (Columns.USER_ID, Columns.ITEM_ID, Columns.TIMESTAMP)


class Samples(NamedTuple):
    """What a source gives.

    Attributes:
        table: All samples.
        catalogue: All items.
        name: Where the samples come from, for messages.
        report: What was dropped or fixed, by file and in words, and how often.
        interactions: All columns of the interactions, a row for each in source order, as far as they are known.
        items: All columns of the items, a row for each in the order of the catalogue, as far as they are known.
    """

    table: SampleTable
    catalogue: Catalogue
    name: str
    report: Faults
    interactions: pd.DataFrame | None = None
    items: pd.DataFrame | None = None


@untyped
class Source(Protocol):
    """Where samples come from."""

    def read(self) -> Samples:
        """Reads everything.

        Raises:
            InputError: Something is missing or wrong; names the file, the line and the fix.
        """


def check_source(source: object) -> None:
    """Refuses what is not a source.

    Raises:
        InputError: Naming it.
    """
    if inspect.isclass(source):
        raise InputError(f"source is the class {source.__name__}: give an object of it, {source.__name__}(...)")
    if not callable(getattr(source, "read", None)):
        raise InputError(f"source is {source!r}: give an object with `read()`, such as InteractionTable(...)")


def samples_of(source: Source) -> Samples:
    """Reads a source.

    Raises:
        InputError: As the source says, or it does not give samples.
    """
    found = source.read()
    if not isinstance(found, Samples):
        raise InputError(
            f"{type(source).__name__}.read returned a {type(found).__name__}: return Samples, as "
            "minirec_pl.data.sources.assemble.from_interactions makes them"
        )
    return found


def from_interactions(
    log: Table, items: Table | None, item_text: Sequence[str], on_missing: OnMissing = "drop"
) -> Samples:
    """Makes samples of a log of interactions.

    Args:
        log: Columns user_id, item_id and timestamp, perhaps rating, split and others; rows in any order.
        items: Column item_id, perhaps title and others; None: the catalogue is the log's items by first appearance.
        item_text: Columns of ``items`` that make up an item's text, in this order.
        on_missing: Drop rows without an id or time and count them, or raise an ``error``.

    Raises:
        InputError: An empty log, a value that cannot be read, or no item of the log is in the catalogue.
    """
    faults = Faults()
    log = whole_rows(log, INTERACTION_COLUMNS, faults, on_missing)
    item_ids = ids_of(log, Columns.ITEM_ID)
    catalogue, item_frame = make_catalogue(items, item_ids, item_text, faults, on_missing)
    frame = pd.DataFrame({"user": ids_of(log, Columns.USER_ID), "item": catalogue.indices_of(item_ids)})
    frame["time"] = times_of(log, Columns.TIMESTAMP)
    frame["rating"], frame["part"] = _ratings(log, faults), _parts(log)
    known = frame["item"].to_numpy() >= 0
    _check_known(known, log, item_ids, items, catalogue)
    faults[f"{log.file}: interactions with an item that is not in the item table: dropped"] += int((~known).sum())
    frame = frame[known]
    twice = frame.duplicated(["user", "item", "time"])
    faults[f"{log.file}: interactions that repeat user, item and time of one before: dropped"] += int(twice.sum())
    frame = frame[~twice]
    unsorted = int((frame["time"].diff() < 0).sum())
    faults[f"{log.file}: interactions earlier than the row before: sorted by time"] += unsorted
    table = SampleTable(
        frame["user"].tolist(),
        frame["item"].to_numpy(),
        frame["time"].to_numpy(),
        len(catalogue),
        frame["rating"].to_numpy() if Columns.RATING in log.frame else None,
        frame["part"].tolist() if Columns.SPLIT in log.frame else None,
    )
    return Samples(table, catalogue, log.name, faults, log.frame.iloc[frame.index], item_frame)


def from_sequences(
    rows: Table, items: Table | None, item_text: Sequence[str], on_missing: OnMissing = "drop"
) -> Samples:
    """Makes samples of ready-made sequences.

    Args:
        rows: Columns user_id, history_item_id (lists, oldest first) and item_id, perhaps timestamp, rating, split,
            history_timestamp and history_rating (lists as long as the histories). Without timestamp the row order is
            the time order.
        items: As of :func:`from_interactions`; None: the items by first appearance.
        item_text: As of :func:`from_interactions`.
        on_missing: As of :func:`from_interactions`; of a history only the missing item goes.

    Raises:
        InputError: No row, a history that is not a list, a value that cannot be read, or no target in the catalogue.
    """
    faults = Faults()
    required = [name for name in INTERACTION_COLUMNS if name != Columns.TIMESTAMP or name in rows.frame]
    rows = whole_rows(rows, required, faults, on_missing)
    lengths = lengths_of(rows, Columns.HISTORY_ITEM_ID)
    owner = np.arange(len(lengths)).repeat(lengths)
    flat_ids = unique_ids(flat_values(rows, Columns.HISTORY_ITEM_ID))
    blank = np.array([item_id == "" for item_id in flat_ids], dtype=bool)
    if blank.any() and on_missing == "error":
        raise InputError(
            f"{rows.where(int(owner[blank][0]))}, column {Columns.HISTORY_ITEM_ID}: an id in the list is missing: give "
            "it, remove it, or set on_missing to drop"
        )
    item_ids = ids_of(rows, Columns.ITEM_ID)
    used = [item_id for item_id in flat_ids if item_id] + item_ids
    catalogue, item_frame = make_catalogue(items, used, item_text, faults, on_missing)
    flat, target = catalogue.indices_of(flat_ids), catalogue.indices_of(item_ids)
    beside = {
        name: _numbers_beside(rows, name, lengths)
        for name in (Columns.HISTORY_TIMESTAMP, Columns.HISTORY_RATING)
        if name in rows.frame
    }
    users = ids_of(rows, Columns.USER_ID)
    known = target >= 0
    _check_known(known, rows, item_ids, items, catalogue)
    times = times_of(rows, Columns.TIMESTAMP) if Columns.TIMESTAMP in rows.frame else None
    twice = _repeated_rows(users, target, np.split(flat, np.cumsum(lengths)[:-1]), times) & known
    kept, inside = known & ~twice, flat >= 0
    faults[f"{rows.file}: sequences whose target is not in the item table: dropped"] += int((~known).sum())
    faults[f"{rows.file}: sequences that repeat one before: dropped"] += int(twice.sum())
    faults[f"{rows.file}: history items without an id: dropped"] += int((blank & kept[owner]).sum())
    unknown = ~inside & ~blank & kept[owner]
    faults[f"{rows.file}: history items that are not in the item table: dropped"] += int(unknown.sum())
    borders = np.cumsum(np.bincount(owner[inside], minlength=len(lengths)))[:-1]

    def per_row(values: npt.NDArray[T]) -> list[npt.NDArray[T]]:
        return [part for part, keep in zip(np.split(values[inside], borders), kept, strict=True) if keep]

    parts = _parts(rows)
    ratings = _ratings(rows, faults)
    history_times = beside.get(Columns.HISTORY_TIMESTAMP) if times is not None else None
    table = SequenceTable(
        [user for user, keep in zip(users, kept, strict=True) if keep],
        target[kept],
        per_row(flat),
        len(catalogue),
        timestamps=None if times is None else times[kept],
        ratings=ratings[kept] if Columns.RATING in rows.frame else None,
        parts=[part for part, keep in zip(parts, kept, strict=True) if keep] if Columns.SPLIT in rows.frame else None,
        history_times=None if history_times is None else per_row(in_seconds(history_times)),
        history_ratings=per_row(beside[Columns.HISTORY_RATING]) if Columns.HISTORY_RATING in beside else None,
    )
    return Samples(table, catalogue, rows.name, faults, rows.frame[kept], item_frame)


def read_items(
    path: str | None, columns: Mapping[str, str], separator: str | None = None, encoding: str | None = None
) -> Table | None:
    """Reads the table of items in a file; None without one."""
    if path is None:
        return None
    table = read_table(Path(path), TextFormat(separator, encoding, "item_"))
    return table.select(columns, (Columns.ITEM_ID,), "item_columns")


def whole_rows(table: Table, columns: Sequence[str], faults: Faults, on_missing: OnMissing) -> Table:
    """Keeps the rows that have all of some ids and times; what is missing says :func:`tables.as_id`.

    Args:
        table: The table, at least one row.
        columns: The columns of ids and times.
        faults: Where the others are counted, by file and column.
        on_missing: Drop the others, or raise an ``error``.

    Raises:
        InputError: No row is left, a missing value with ``error`` (names the line), or another word in ``on_missing``.
    """
    if on_missing not in ("drop", "error"):
        raise InputError(f"on_missing={on_missing!r}: give 'drop' or 'error'")
    _check_rows(table)
    n_rows = len(table.frame)
    kept = np.ones(n_rows, dtype=bool)
    for column in columns:
        missing = is_missing(table, column) & kept
        if missing.any() and on_missing == "error":
            raise refuse_missing(table, column, int(np.argmax(missing)))
        faults[f"{table.file}: rows without {column}: dropped"] += int(missing.sum())
        kept &= ~missing
    if not kept.any():
        raise InputError(
            f"{table.name}: each of its {n_rows} rows lacks one of {', '.join(columns)}: name the right columns"
        )
    return table if kept.all() else table.keep(kept)


def make_catalogue(
    items: Table | None,
    used_ids: Sequence[str],
    item_text: Sequence[str],
    faults: Faults,
    on_missing: OnMissing = "drop",
) -> tuple[Catalogue, pd.DataFrame]:
    """Makes the catalogue of an item table; without one, of the used ids by first appearance.

    Titles and texts are cleaned by :func:`clean_text`. An item without a title gets its id for one, an item without
    text its title. Texts are left whole, however long: what a model reads of them is its own matter.

    Returns:
        The catalogue, and the rows of the table that it is made of.

    Raises:
        InputError: No row, a missing id with ``on_missing="error"``, or an unknown column in ``item_text``.
    """
    if items is None:
        return Catalogue(list(dict.fromkeys(used_ids))), pd.DataFrame()
    items = whole_rows(items, (Columns.ITEM_ID,), faults, on_missing)
    ids = ids_of(items, Columns.ITEM_ID)
    twice = pd.Series(ids).duplicated().to_numpy()
    faults[f"{items.file}: rows whose item_id came before: dropped"] += int(twice.sum())
    frame = items.frame[~twice]
    ids = [item_id for item_id, again in zip(ids, twice, strict=True) if not again]
    absent = [name for name in item_text if name not in frame and name != Columns.TITLE]
    if absent:
        columns = ", ".join(map(str, frame.columns))
        raise InputError(
            f"{items.name}: item_text names {absent[0]!r}, but the columns are {columns}: name one of these"
        )
    texts = {name: [clean_text(value) for value in frame[name]] for name in {*item_text, Columns.TITLE} & {*frame}}
    if Columns.TITLE in texts:
        faults[f"{items.file}: items without a title: the id stands in"] += texts[Columns.TITLE].count("")
    joined = [
        ", ".join(filter(None, parts)) for parts in zip(*(texts[n] for n in item_text if n in texts), strict=True)
    ]
    return Catalogue(ids, texts.get(Columns.TITLE), joined or None), frame


def _check_rows(table: Table) -> None:
    if len(table.frame) == 0:
        raise InputError(f"{table.name} has no rows: give a table with at least one")


def _check_known(
    known: BoolArray, log: Table, item_ids: Sequence[str], items: Table | None, catalogue: Catalogue
) -> None:
    if not known.any() and items is not None:
        raise InputError(
            f"{log.name}: none of its items is in {items.name}, ids are like {item_ids[0]!r} in the one and like "
            f"{catalogue.item_ids[0]!r} in the other: name the right column of each as item_id"
        )


def _ratings(table: Table, faults: Faults) -> FloatArray:
    if Columns.RATING not in table.frame:
        return np.full(len(table.frame), np.nan)
    ratings = numbers_of(table, Columns.RATING, required=False)
    faults[f"{table.file}: ratings that are missing: kept as unknown"] += int(np.isnan(ratings).sum())
    return ratings


def _parts(table: Table) -> list[str]:
    if Columns.SPLIT not in table.frame:
        return [""] * len(table.frame)
    given = [str(value).strip().lower() for value in table.frame[Columns.SPLIT]]
    row = next((row for row, name in enumerate(given) if name not in PARTS), None)
    if row is not None:
        raise InputError(
            f"{table.where(row)}, column {Columns.SPLIT}: {given[row]!r} is not one of {', '.join(PARTS)}: fix it"
        )
    return [PARTS[name] for name in given]


def _numbers_beside(table: Table, column: str, lengths: IntArray) -> FloatArray:
    own = lengths_of(table, column)
    if (own != lengths).any():
        row = int(np.argmax(own != lengths))
        raise InputError(
            f"{table.where(row)}: {column} has {own[row]} values and {Columns.HISTORY_ITEM_ID} {lengths[row]}: give "
            "one for each item"
        )
    return np.asarray(
        pd.to_numeric(pd.Series(flat_values(table, column), dtype=object), errors="coerce"), dtype=np.float64
    )


def _repeated_rows(
    users: Sequence[str], target: IntArray, histories: Sequence[IntArray], times: FloatArray | None
) -> BoolArray:
    when = np.zeros(len(users)) if times is None else times
    keys = [
        (user, item, history.tobytes(), time)
        for user, item, history, time in zip(users, target.tolist(), histories, when.tolist(), strict=True)
    ]
    return pd.Series(keys, dtype=object).duplicated().to_numpy()
