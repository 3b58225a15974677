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
from minirec_pl.data.samples import Catalogue, SampleTable
from minirec_pl.data.sources.assemble import INTERACTION_COLUMNS, Faults, Samples
from minirec_pl.utils.errors import InputError

ColumnType = Literal["token", "token_seq", "float", "float_seq"]
COLUMN_TYPES: Final[tuple[ColumnType, ...]] = ("token", "token_seq", "float", "float_seq")
_NEVER_EMPTY: Final = (Columns.USER_ID, Columns.ITEM_ID)


TITLE_COLUMNS: Final = {"movie_title": Columns.TITLE}


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
        """Reads the files.

        Raises:
            InputError: A file is missing or wrong; names the line.
        """
        folder = Path(self.path, self.dataset)
        interactions = atomic_file(Path(self.path), self.dataset)
        frame = read_atomic(interactions, required=INTERACTION_COLUMNS)
        if frame[Columns.TIMESTAMP].dtype != np.float64:
            raise InputError(
                f"{interactions}, line 1, column timestamp: not a float: write 'timestamp:float', in unix seconds"
            )
        if Columns.RATING in frame and frame[Columns.RATING].dtype != np.float64:
            frame = frame.drop(columns=Columns.RATING)
        catalogue = _atomic_catalogue(folder / f"{self.dataset}.item", frame[Columns.ITEM_ID].tolist())
        _check_users(folder / f"{self.dataset}.user", interactions, frame[Columns.USER_ID].tolist())
        table = SampleTable.from_interactions(frame, catalogue, source=str(interactions))
        return Samples(table, catalogue, str(interactions), Faults())


def read_atomic(path: Path, columns: Mapping[str, str] | None = None, *, required: Sequence[str] = ()) -> pd.DataFrame:
    r"""Read one RecBole atomic file (``.inter``, ``.item``, ``.user``).

    The first line holds ``name:type`` fields, type being ``token``, ``token_seq``, ``float`` or ``float_seq``. Row
    ``i`` of the result is line ``i + 2`` of the file.

    Args:
        path: The file, UTF-8, fields separated by tabs.
        columns: New names for some columns, from the file's name to ours.
        required: Names (after renaming) that must be there.

    Returns:
        A frame with the file's columns in the file's order: ``float`` as float64, all other types as str (sequences
        stay separated by spaces).

    Raises:
        InputError: No file, no typed header, a line with another number of fields, a float that is not a finite number,
            an empty user or item id, a required column that is absent.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "toy.inter")
        ...     _ = file.write_text("user_id:token\ttimestamp:float\nann\t12\n")
        ...     read_atomic(file).to_dict("records")
        [{'user_id': 'ann', 'timestamp': 12.0}]
    """
    lines, terminated = _read_lines(path)
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
            if name in _NEVER_EMPTY and "" in values:
                raise InputError(
                    f"{path}, line {values.index('') + 2}, column {name}: the id is empty: give it a value"
                )
            data[name] = pd.Series(values, dtype="str")
    return pd.DataFrame(data, columns=list(types))


def _read_lines(path: Path) -> tuple[list[str], bool]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path or put the file there") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the path of an atomic file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from None
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


def _atomic_catalogue(path: Path, interacted: list[str]) -> Catalogue:
    if not path.is_file():
        return Catalogue(list(dict.fromkeys(interacted)))
    items = read_atomic(path, TITLE_COLUMNS, required=(Columns.ITEM_ID,))
    twice = items[Columns.ITEM_ID].duplicated()
    if twice.any():
        row = int(np.argmax(twice))
        raise InputError(
            f"{path}, line {row + 2}: the item {items[Columns.ITEM_ID].iloc[row]!r} comes twice: keep one row"
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
            f"{interactions}, line {row + 2}: the user {user_ids[row]!r} is not in {path.name}: add it there or "
            "fix the order of the columns"
        )
