"""Reads RecBole atomic files: tab-separated text whose header gives each column a name and a type."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.fetch import atomic_file
from minirec_pl.data.samples import BoolArray, Catalogue, SampleTable
from minirec_pl.data.sources.assemble import INTERACTION_COLUMNS, Faults, OnMissing, Samples, whole_rows
from minirec_pl.data.sources.files import TextFormat, read_text
from minirec_pl.data.sources.tables import MISSING, Table, unique_ids
from minirec_pl.utils.errors import InputError

ColumnType = Literal["token", "token_seq", "float", "float_seq"]
COLUMN_TYPES: Final[tuple[ColumnType, ...]] = ("token", "token_seq", "float", "float_seq")
_USER: Final = (Columns.USER_ID,)
TITLE_COLUMNS: Final = {"movie_title": Columns.TITLE}


@dataclass(frozen=True)
class AtomicFiles:
    """RecBole atomic files: ``<path>/<dataset>/<dataset>.inter`` and, where they exist, ``.item`` and ``.user``.

    The catalogue is the ``.item`` file in its order, else the items by first appearance. An item's text is
    ``title (release_year), class`` as far as the file has these columns. Rows without an id or time are dropped and
    counted, as of :class:`InteractionTable`. Such files are made by programs, so what else does not fit (an item or
    user that is not in its file, an item twice) is refused.

    Args:
        path: Folder that holds a folder per dataset.
        dataset: Name of the dataset's folder and files.
        encoding: Such as ``cp1252``; None takes what the byte order mark says, else UTF-8.
        on_missing: Drop rows without an id or time and count them, or raise an ``error``.

    Example:
        >>> AtomicFiles("data", "ml-100k").read().catalogue.texts[0]  # doctest: +SKIP
        "Toy Story (1995), Animation, Children's, Comedy"
    """

    path: str
    dataset: str = "ml-100k"
    encoding: str | None = None
    on_missing: OnMissing = "drop"

    def read(self) -> Samples:
        """Reads the files.

        Raises:
            InputError: A file is missing or wrong; names the line.
        """
        folder = Path(self.path, self.dataset)
        interactions = atomic_file(Path(self.path), self.dataset)
        faults = Faults()
        log = self._whole(interactions, INTERACTION_COLUMNS, faults)
        frame = log.frame
        if frame[Columns.TIMESTAMP].dtype != np.float64:
            raise InputError(
                f"{interactions}, line 1, column timestamp: not a float: write 'timestamp:float', in unix seconds"
            )
        if Columns.RATING in frame and frame[Columns.RATING].dtype != np.float64:
            frame = frame.drop(columns=Columns.RATING)
        if Columns.RATING in frame:
            missing = int(frame[Columns.RATING].isna().sum())
            faults[f"{log.file}: ratings that are missing: kept as unknown"] += missing
        users, item_ids = (unique_ids(frame[name]) for name in (Columns.USER_ID, Columns.ITEM_ID))
        catalogue, items = self._catalogue(folder / f"{self.dataset}.item", item_ids, faults)
        indices = catalogue.indices_of(item_ids)
        fault = "the item {!r} is not in the item file: add it there or remove the interaction"
        _check_known(indices >= 0, log, item_ids, fault)
        path = folder / f"{self.dataset}.user"
        if path.is_file():
            known = set(unique_ids(read_atomic(path, encoding=self.encoding, required=_USER)[Columns.USER_ID]))
            inside = np.array([user in known for user in users], dtype=bool)
            fault = f"the user {{!r}} is not in {path.name}: add it there or fix the order of the columns"
            _check_known(inside, log, users, fault)
        table = SampleTable(
            users,
            indices,
            frame[Columns.TIMESTAMP].to_numpy(),
            len(catalogue),
            frame[Columns.RATING].to_numpy() if Columns.RATING in frame else None,
        )
        return Samples(table, catalogue, str(interactions), faults, frame, items)

    def _whole(self, path: Path, columns: Sequence[str], faults: Faults) -> Table:
        frame = read_atomic(path, TITLE_COLUMNS, required=columns, encoding=self.encoding)
        return whole_rows(Table(str(path), frame, has_header=True), columns, faults, self.on_missing)

    def _catalogue(self, path: Path, used_ids: Sequence[str], faults: Faults) -> tuple[Catalogue, pd.DataFrame]:
        if not path.is_file():
            return Catalogue(list(dict.fromkeys(used_ids))), pd.DataFrame()
        table = self._whole(path, (Columns.ITEM_ID,), faults)
        items, ids = table.frame, unique_ids(table.frame[Columns.ITEM_ID])
        twice = pd.Series(ids).duplicated()
        if twice.any():
            row = int(np.argmax(twice))
            raise InputError(f"{table.where(row)}: the item {ids[row]!r} comes twice: keep one row")
        titles = items[Columns.TITLE].tolist() if Columns.TITLE in items else None
        return Catalogue(ids, titles, _atomic_texts(items) if titles else None), items


def read_atomic(
    path: Path, columns: Mapping[str, str] | None = None, *, required: Sequence[str] = (), encoding: str | None = None
) -> pd.DataFrame:
    r"""Read one RecBole atomic file (``.inter``, ``.item``, ``.user``).

    The first line holds ``name:type`` fields, type being ``token``, ``token_seq``, ``float`` or ``float_seq``. Row
    ``i`` of the result is line ``i + 2`` of the file.

    Args:
        path: The file, fields separated by tabs.
        columns: New names for some columns, from the file's name to ours.
        required: Names (after renaming) that must be there.
        encoding: None takes what the byte order mark says, else UTF-8.

    Returns:
        A frame with the file's columns in the file's order: ``float`` as float64, NaN where it is missing, all other
        types as str (sequences stay separated by spaces).

    Raises:
        InputError: No file, no typed header, a line with another number of fields, a float that is not a finite number,
            a required column that is absent.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "toy.inter")
        ...     _ = file.write_text("user_id:token\ttimestamp:float\nann\t12\n")
        ...     read_atomic(file).to_dict("records")
        [{'user_id': 'ann', 'timestamp': 12.0}]
    """
    lines, terminated = _read_lines(path, encoding)
    types = _parse_header(path, lines[0], columns or {}, required)
    body = lines[1:]
    _check_field_counts(path, body, list(types))
    flat = list(chain.from_iterable(line.split("\t") for line in body))
    if not terminated and body and next(reversed(types.values())) == "float":
        _check_last_value(path, next(reversed(types)), flat[len(types) - 1 :: len(types)])
    data: dict[str, pd.Series] = {}
    for position, (name, kind) in enumerate(types.items()):
        values = flat[position :: len(types)]
        if kind == "float":
            data[name] = _parse_floats(path, name, values)
        else:
            data[name] = pd.Series(values, dtype="str")
    return pd.DataFrame(data, columns=list(types))


def _read_lines(path: Path, encoding: str | None) -> tuple[list[str], bool]:
    try:
        text = read_text(path, TextFormat(encoding=encoding))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path or put the file there") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the path of an atomic file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if not text:
        raise InputError(f"{path} is empty: give it a header line such as 'user_id:token\\titem_id:token'")
    terminated = text.endswith("\n")
    lines = text.removesuffix("\n").split("\n")
    if "\r" in text:
        lines = [line.removesuffix("\r") for line in lines]
    return lines, terminated


def _parse_header(path: Path, line: str, renames: Mapping[str, str], required: Sequence[str]) -> dict[str, ColumnType]:
    types: dict[str, ColumnType] = {}
    for field in line.split("\t"):
        name, colon, kind = field.rpartition(":")
        if not colon or not name:
            raise InputError(
                f"{path}, line 1: {field[:40]!r} is not a 'name:type' field: begin the file with a RecBole header such "
                "as 'user_id:token\\titem_id:token\\trating:float\\ttimestamp:float'"
            )
        if kind not in COLUMN_TYPES:
            raise InputError(
                f"{path}, line 1, column {name}: unknown type {kind!r}: use one of {', '.join(COLUMN_TYPES)}"
            )
        name = renames.get(name, name)
        if name in types:
            raise InputError(f"{path}, line 1: the column {name} comes twice: keep one of them")
        types[name] = kind
    missing = [name for name in required if name not in types]
    if missing:
        raise InputError(f"{path}, line 1: no column {missing[0]} among {', '.join(types)}: add it to the file")
    return types


def _check_field_counts(path: Path, body: list[str], names: list[str]) -> None:
    expected = len(names) - 1
    counts = [line.count("\t") for line in body]
    if counts.count(expected) == len(counts):
        return
    row = next(i for i, count in enumerate(counts) if count != expected)
    found = counts[row] + 1 if body[row] else 0
    truncated = row == len(body) - 1 and found <= expected
    remedy = "copy the file again, it seems truncated" if truncated else "fix or remove the line"
    raise InputError(
        f"{path}, line {row + 2}: {found} fields instead of the {len(names)} of the header ({', '.join(names)}): "
        f"{remedy}"
    )


def _parse_floats(path: Path, name: str, values: list[str]) -> pd.Series:
    numbers = np.asarray(pd.to_numeric(np.asarray(values, dtype=object), errors="coerce"), dtype=np.float64)
    finite = np.isfinite(numbers)
    for place in np.flatnonzero(~finite).tolist():
        finite[place] = values[place].strip().lower() in MISSING
    numbers[~np.isfinite(numbers)] = np.nan
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(
            f"{path}, line {row + 2}, column {name}: {values[row]!r} is not a finite number, but the header says "
            f"'{name}:float': fix the value or the order of the columns"
        )
    return pd.Series(numbers)


def _check_last_value(path: Path, name: str, values: list[str]) -> None:
    """A file cut inside its last number still parses: notice the number that is shorter than all others."""
    shortest = min(map(len, values[:-1]), default=math.inf)
    if len(values) > 1 and len(values[-1]) < shortest:
        raise InputError(
            f"{path}, line {len(values) + 1}, column {name}: the file seems truncated, it ends inside the number "
            f"{values[-1]!r}: copy the file again, or end it with a newline if it is whole"
        )


def _atomic_texts(items: pd.DataFrame) -> list[str]:
    nothing = [""] * len(items)
    years = items["release_year"].astype(str).tolist() if "release_year" in items else nothing
    genres = items["class"].astype(str).tolist() if "class" in items else nothing
    return [
        ", ".join(filter(None, [f"{title} ({year})" if title and year else title, *genre.split()]))
        for title, year, genre in zip(items[Columns.TITLE].tolist(), years, genres, strict=True)
    ]


def _check_known(known: BoolArray, log: Table, ids: Sequence[str], sentence: str) -> None:
    if not known.all():
        row = int(np.argmin(known))
        raise InputError(f"{log.where(row)}: {sentence.format(ids[row])}")
