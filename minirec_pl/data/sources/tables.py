"""Tables that users bring: read as they are, then ids, numbers, times and texts made uniform."""

from __future__ import annotations

import gzip
import html
import io
import re
import unicodedata
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.samples import FloatArray, IntArray
from minirec_pl.utils.errors import InputError

_WHOLE: Final = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
_MISSING: Final = frozenset({"", "nan", "na", "n/a", "null", "none"})
_UNITS: Final = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (np.inf, 1e9))  # seconds, milli-, micro-, nanoseconds
_EPOCH: Final = pd.Timestamp(0, tz="UTC")
_OURS: Final = tuple(value for name, value in vars(Columns).items() if name.isupper())


class Table(NamedTuple):
    """A frame and where it comes from.

    Attributes:
        name: File or dataset, for messages.
        frame: Its rows; those of a CSV file are all text.
        has_header: The rows are lines below a header line, counted from 2; else they are rows, counted from 1.
    """

    name: str
    frame: pd.DataFrame
    has_header: bool = False

    def where(self, row: int) -> str:
        """Names the file and line (or row) of the row at this position."""
        if not self.has_header:
            return f"{self.name}, row {row + 1}"
        breaks = sum(int(self.frame[column].iloc[:row].str.count("\n").sum()) for column in self.frame)
        return f"{self.name}, line {row + 2 + breaks}"

    def select(self, columns: Mapping[str, str], required: Sequence[str]) -> Table:
        """Renames the columns to the library's names.

        Args:
            columns: From the library's name to the file's, for columns that are called differently.
            required: Names of the library that must be there.

        Raises:
            InputError: A name that the library does not know, or a column that is absent.
        """
        for ours, theirs in columns.items():
            if ours not in _OURS:
                raise InputError(f"columns names {ours!r}, which is not one of {', '.join(_OURS)}: fix the key")
            if theirs not in self.frame:
                raise InputError(
                    f"{self.name}: no column {theirs!r} (for {ours}) among {self._names()}: fix the name in columns"
                )
        renamed = self.frame.drop(columns=[ours for ours in columns if ours in self.frame and columns[ours] != ours])
        renamed = renamed.rename(columns={theirs: ours for ours, theirs in columns.items()})
        missing = next((name for name in required if name not in renamed), None)
        if missing is not None:
            raise InputError(
                f"{self.name}: no column {missing!r} among {self._names()}: say which one it is with "
                f"columns: {{{missing}: NAME}}"
            )
        return self._replace(frame=renamed)

    def _names(self) -> str:
        return ", ".join(map(str, self.frame.columns)) or "no columns"


def read_table(path: Path) -> Table:
    """Reads a table with a header.

    Args:
        path: ``.csv`` (commas) or ``.tsv`` (tabs), UTF-8, perhaps ``.gz``, of which every value stays text; or
            ``.parquet``.

    Raises:
        InputError: No such file, another ending, not UTF-8 (with the line), damaged.
    """
    name = path.name.removesuffix(".gz").lower()
    if path.is_dir() or not path.exists():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the path of a table")
    try:
        if name.endswith(".parquet"):
            return Table(str(path), pd.read_parquet(path))
        if name.endswith((".csv", ".tsv")):
            text = io.StringIO(read_text(path))
            separator = "\t" if name.endswith(".tsv") else ","
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with too many fields
                frame = pd.read_csv(text, sep=separator, dtype=str, keep_default_na=False, index_col=False)
            return Table(str(path), frame, has_header=True)
    except InputError:
        raise
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}): fix the file or export it again") from error
    raise InputError(f"{path} is not a table of a known kind: give a .csv, .tsv (either also .gz) or .parquet file")


def read_text(path: Path) -> str:
    """Reads the text of a UTF-8 file, unpacked where it ends in ``.gz``.

    Raises:
        InputError: Not UTF-8 (with the line), or damaged.
    """
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path} is damaged or truncated: copy it again") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 text (perhaps Windows cp1252): save the file as UTF-8"
        ) from None


def as_id(value: Any) -> str:
    """Spells an id in one way, whether it is a number in one file or text in another.

    Text is stripped of surrounding space; a whole number loses its decimal point, so that 12, 12.0 and "12.0" are all
    "12". Nothing else changes: "007" stays "007". A missing value gives "".
    """
    if value is None or value is pd.NA or value != value:
        return ""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    if whole is None and isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return whole[1] if whole else text


def ids_of(table: Table, column: str) -> list[str]:
    """Reads the ids of a column, each by :func:`as_id`.

    Raises:
        InputError: An empty id, with its line.
    """
    ids = unique_ids(table.frame[column])
    if "" in ids:
        raise InputError(f"{table.where(ids.index(''))}, column {column}: the id is empty: give it or remove the row")
    return ids


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
    missing = given.isna() | given.astype(str).str.strip().str.lower().isin(_MISSING)
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
    """Counts the values of each list of a column, [n] int64.

    Raises:
        InputError: What is there is not a list, with its line.
    """
    values = table.frame[column]
    for row, value in enumerate(values):
        if not isinstance(value, list | tuple | np.ndarray):
            raise InputError(
                f"{table.where(row)}, column {column}: {str(value)[:40]!r} is not a list: store lists, as parquet can"
            )
    return np.array([len(value) for value in values], dtype=np.int64)


def times_of(table: Table, column: str) -> FloatArray:
    """Reads the times of a column, unix seconds, [n] float64.

    Takes dates (ISO 8601, UTC unless they say otherwise) and unix times, whose unit follows from their size: seconds
    up to 1e11 (the year 5138), then milli-, micro- and nanoseconds.

    Raises:
        InputError: A value that is neither, with its line.
    """
    given = table.frame[column]
    first = given.iloc[0] if len(given) else None
    is_date = pd.api.types.is_datetime64_any_dtype(given) or (
        isinstance(first, str) and bool(re.match(r"\s*\d{4}-\d{2}", first))
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
