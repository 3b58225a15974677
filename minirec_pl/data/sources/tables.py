"""Tables that users bring: read as they are, then ids, numbers, times and texts made uniform."""

from __future__ import annotations

import datetime
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.samples import BoolArray, FloatArray, IntArray
from minirec_pl.utils.errors import InputError

_WHOLE: Final = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
MISSING: Final = frozenset({"", "nan", "nat", "none", "null", "<na>", r"\n"})
_NO_NUMBER: Final = MISSING | {"na", "n/a"}
_UNITS: Final = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (np.inf, 1e9))  # seconds, milli-, micro-, nanoseconds
_EPOCH: Final = pd.Timestamp(0, tz="UTC")
_OURS: Final = tuple(value for name, value in vars(Columns).items() if name.isupper())


class Table(NamedTuple):
    """A frame and where it comes from.

    Attributes:
        name: File or dataset, for messages.
        frame: Its rows; those of a CSV file are all text.
        has_header: The rows are lines, those below a header line counted from 2; else they are rows, counted from 1.
        lines: Line (or row) of each, [n], where they do not follow from the above.
    """

    name: str
    frame: pd.DataFrame
    has_header: bool = False
    lines: IntArray | None = None

    @property
    def file(self) -> str:
        """The name without its folder, for counts."""
        return Path(self.name).name

    def where(self, row: int) -> str:
        """Names the file and line (or row) of the row at this position."""
        return f"{self.name}, {'line' if self.has_header else 'row'} {self._lines(row + 1)[row]}"

    def _lines(self, n: int) -> IntArray:
        """Line or row of the first n."""
        if self.lines is not None:
            return self.lines[:n]
        numbers = np.arange(1, n + 1, dtype=np.int64)
        if self.has_header:
            texts = self.frame.iloc[:n].select_dtypes(exclude="number")
            breaks = sum((texts[column].str.count("\n").fillna(0).to_numpy() for column in texts), np.zeros(n))
            numbers[:] += 1
            numbers[1:] += np.cumsum(breaks).astype(np.int64)[:-1]
        return numbers

    def keep(self, rows: BoolArray) -> Table:
        """Drops the other rows; those that stay keep their lines."""
        lines = self._lines(len(self.frame))[rows]
        return self._replace(frame=self.frame[rows].reset_index(drop=True), lines=lines)

    def select(self, columns: Mapping[str, str], required: Sequence[str], option: str = "columns") -> Table:
        """Renames the columns to the library's names.

        Args:
            columns: From the library's name to the file's, for columns that are called differently.
            required: Names of the library that must be there.
            option: What ``columns`` is called where a user gives it, with ``--`` on a command line.

        Raises:
            InputError: A name that the library does not know, or a column that is absent.
        """
        for ours, theirs in columns.items():
            if ours not in _OURS:
                raise InputError(f"{option} names {ours!r}, which is not one of {', '.join(_OURS)}: fix the key")
            if theirs not in self.frame:
                raise InputError(
                    f"{self.name}: no column {theirs!r} (for {ours}) among {self._names()}: fix the name in {option}"
                )
        renamed = self.frame.drop(columns=[ours for ours in columns if ours in self.frame and columns[ours] != ours])
        renamed = renamed.rename(columns={theirs: ours for ours, theirs in columns.items()})
        missing = next((name for name in required if name not in renamed), None)
        if missing is not None:
            given = f"{option} '{{{missing}: NAME}}'" if option.startswith("--") else f"{option}: {{{missing}: NAME}}"
            raise InputError(
                f"{self.name}: no column {missing!r} among {self._names()}: say which one it is with {given}"
            )
        return self._replace(frame=renamed)

    def _names(self) -> str:
        return ", ".join(map(str, self.frame.columns)) or "no columns"


def as_id(value: Any) -> str:
    r"""Spells an id in one way, whether it is a number in one file or text in another.

    Text is stripped of surrounding space; a whole number loses its decimal point, so that 12, 12.0 and "12.0" are all
    "12". Nothing else changes: "007" stays "007". A missing value gives "": a null, a NaN, and a text that is blank or,
    in any case, nan, NaT, none, null, <NA> or \N. The texts NA and N/A are ids like others.

    Example:
        >>> as_id(12.0), as_id(" 12.0 "), as_id("007"), as_id("NA"), as_id("None"), as_id(float("nan"))
        ('12', '12', '007', 'NA', '', '')
    """
    if value is None or value is pd.NA or value != value:
        return ""
    text = str(value).strip()
    if text.lower() in MISSING:
        return ""
    whole = _WHOLE.fullmatch(text)
    if whole is None and isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return whole[1] if whole else text


def ids_of(table: Table, column: str) -> list[str]:
    """Reads the ids of a column, each by :func:`as_id`.

    Raises:
        InputError: A missing id, with its line.
    """
    ids = unique_ids(table.frame[column])
    if "" in ids:
        raise refuse_missing(table, column, ids.index(""))
    return ids


def is_missing(table: Table, column: str) -> BoolArray:
    """Finds the rows whose id or time is missing by the rule of :func:`as_id`; for a time NA and N/A are missing, too.

    Args:
        table: The table.
        column: Its column.

    Returns:
        bool [n].
    """
    given = table.frame[column]
    if pd.api.types.is_numeric_dtype(given) or pd.api.types.is_datetime64_any_dtype(given):
        return given.isna().to_numpy(dtype=bool)
    texts = _NO_NUMBER if column == Columns.TIMESTAMP else MISSING
    try:
        codes, uniques = pd.factorize(given.to_numpy(dtype=object), use_na_sentinel=False)
    except TypeError:
        raise InputError(
            f"{table.name}, column {column}: it holds lists or objects: name a column of single values"
        ) from None
    missing = [bool(pd.api.types.is_scalar(v) and pd.isna(v)) or str(v).strip().lower() in texts for v in uniques]
    return np.array(missing, dtype=bool)[codes]


def refuse_missing(table: Table, column: str, row: int) -> InputError:
    """Makes the error of a missing id or time."""
    what = "time" if column == Columns.TIMESTAMP else "id"
    given = table.frame[column].iloc[row]
    shown = f" ({given!r})" if isinstance(given, str) and given.strip() else ""
    return InputError(
        f"{table.where(row)}, column {column}: the {what} is missing{shown}: give it, remove the row, or set "
        "on_missing to drop"
    )


def unique_ids(values: Any) -> list[str]:
    """Spells many values by :func:`as_id`, computed once for each different one."""
    codes, uniques = pd.factorize(np.asarray(values, dtype=object), use_na_sentinel=False)
    spelled = np.array([as_id(value) for value in uniques], dtype=object)
    return [str(text) for text in spelled[codes]]


def numbers_of(table: Table, column: str, *, required: bool) -> FloatArray:
    """Reads the numbers of a column, [n] float64.

    Args:
        table: The table.
        column: Its column, of numbers or text.
        required: Refuse a missing one; else it is NaN.

    Raises:
        InputError: A value is not a finite number, with its line.
    """
    given = table.frame[column]
    missing = given.isna() | given.astype(str).str.strip().str.lower().isin(_NO_NUMBER)
    numbers = np.asarray(pd.to_numeric(given.where(~missing), errors="coerce"), dtype=np.float64)
    wrong = ~np.isfinite(numbers) & (True if required else ~missing.to_numpy())
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"{table.where(row)}, column {column}: {given.iloc[row]!r} is not a finite number: fix the value or the "
            "column's name"
        )
    return numbers


def lengths_of(table: Table, column: str) -> IntArray:
    """Counts the values of each list of a column, [n] int64; a null counts as an empty list.

    Raises:
        InputError: What is there is not a list, with its line.
    """
    values = table.frame[column]
    for row, value in enumerate(values):
        if not isinstance(value, list | tuple | np.ndarray) and not _is_null(value):
            raise InputError(
                f"{table.where(row)}, column {column}: {str(value)[:40]!r} is not a list: store lists, as parquet and "
                "JSON lines can"
            )
    return np.array([0 if _is_null(value) else len(value) for value in values], dtype=np.int64)


def flat_values(table: Table, column: str) -> list[object]:
    """Joins the lists of a column; see :func:`lengths_of`."""
    return [value for values in table.frame[column] if not _is_null(values) for value in values]


def _is_null(value: Any) -> bool:
    return value is None or value is pd.NA or isinstance(value, float)


def times_of(table: Table, column: str) -> FloatArray:
    """Reads the times of a column, unix seconds, [n] float64.

    Takes dates (ISO 8601, UTC unless they say otherwise) and unix times, whose unit follows from their size: seconds
    up to 1e11 (the year 5138), then milli-, micro- and nanoseconds.

    Raises:
        InputError: A value that is neither, with its line.
    """
    given = table.frame[column]
    first = given.iloc[0] if len(given) else None
    is_date = (
        pd.api.types.is_datetime64_any_dtype(given)
        or isinstance(first, datetime.date)
        or (isinstance(first, str) and bool(re.match(r"\s*\d{4}-\d{2}", first)))
    )
    if not is_date:
        return in_seconds(numbers_of(table, column, required=True))
    dates = pd.to_datetime(given, utc=True, errors="coerce", format="ISO8601")
    if dates.isna().any():
        row = int(np.argmax(dates.isna()))
        raise InputError(
            f"{table.where(row)}, column {column}: {given.iloc[row]!r} is not a date: write it like 2023-09-30"
        )
    return np.asarray((dates - _EPOCH) / pd.Timedelta(seconds=1), dtype=np.float64)


def in_seconds(times: FloatArray) -> FloatArray:
    """Converts unix times of any unit to seconds; the unit follows from the median size."""
    known = np.abs(times[np.isfinite(times)])
    size = float(np.median(known)) if len(known) else 0.0
    return times / next(unit for limit, unit in _UNITS if size < limit)


def clean_text(value: Any) -> str:
    r"""Cleans a text for people and models: entities unescaped, NFC, white space collapsed; a list joined by commas.

    Example:
        >>> clean_text("  Rock &amp;\n Roll "), clean_text(["a", None, "b"]), clean_text(1999.0)
        ('Rock & Roll', 'a, b', '1999')
    """
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(filter(None, map(clean_text, value)))
    if isinstance(value, float | np.floating):
        return as_id(value)
    if value is None or value is pd.NA:
        return ""
    return " ".join(unicodedata.normalize("NFC", html.unescape(str(value))).split())
