"""Files that users bring, read as they are: text of any encoding, separated tables, JSON lines, parquet."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from minirec_pl.data.sources.tables import Table
from minirec_pl.utils.errors import InputError

SEPARATORS: Final = ("\t", "::", ";", "|", ",")
_SEPARATED: Final = (".csv", ".tsv", ".dat", ".txt")
_JSON_LINES: Final = (".jsonl", ".ndjson", ".json")
_ONE_CHARACTER: Final = "\x1f"  # stands for a longer separator; ASCII's own unit separator, which no text holds
_MARKS: Final = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextFormat(NamedTuple):
    """How the text of a table is written, and what the options are called that say so.

    Attributes:
        separator: What separates values; None takes of tab, ``::``, ``;``, ``|`` and comma the one that the header
            holds most often, outside of quotes.
        encoding: As Python names it; None takes what the byte order mark says, else UTF-8.
        prefix: What the names of the options begin with; None where there are no such options.
    """

    separator: str | None = None
    encoding: str | None = None
    prefix: str | None = ""

    @property
    def codec(self) -> str | None:
        """Python's own name of the encoding.

        Raises:
            InputError: There is none of that name.
        """
        try:
            return None if self.encoding is None else codecs.lookup(self.encoding).name
        except LookupError:
            raise InputError(
                f"{self.prefix}encoding is {self.encoding!r}, which is unknown: give one that Python knows, such as "
                "cp1252 or utf-16"
            ) from None

    def wrong(self, path: Path, line: int) -> InputError:
        """Makes the error of a file that has another encoding."""
        if self.encoding is None:
            named = "" if self.prefix is None else f"set {self.prefix}encoding to the one it has, or "
            return InputError(
                f"{path}, line {line}: not UTF-8 text (perhaps Windows cp1252): {named}save the file as UTF-8"
            )
        return InputError(
            f"{path}, line {line}: not text in the encoding {self.encoding!r}: set {self.prefix}encoding to the one it "
            "has"
        )


PLAIN: Final = TextFormat(prefix=None)


def read_table(path: Path, text: TextFormat = PLAIN) -> Table:
    """Reads a table.

    Args:
        path: Text with a header line and a separator (``.csv``, ``.tsv``, ``.dat``, ``.txt``), of which every value
            stays text; JSON lines, an object each (``.jsonl``, ``.ndjson``, ``.json``); each perhaps ``.gz``; or
            ``.parquet``.
        text: How a text is written.

    Raises:
        InputError: No such file, another ending, another encoding (with the line), two separators that are as likely,
            damaged.
    """
    name = path.name.removesuffix(".gz").lower()
    if path.is_dir() or not path.exists():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the path of a table")
    try:
        if name.endswith(".parquet"):
            return Table(str(path), _read_parquet(path))
        if name.endswith(_JSON_LINES):
            return _json_table(path, text)
        if name.endswith(_SEPARATED):
            return _separated_table(path, text)
    except InputError:
        raise
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}): fix the file or export it again") from error
    raise InputError(
        f"{path} is not a table of a known kind: give a .csv, .tsv, .dat, .txt or .jsonl file (each also .gz), or "
        ".parquet"
    )


def read_text(path: Path, text: TextFormat = PLAIN) -> str:
    """Reads the text of a file, unpacked where it ends in ``.gz``, without its byte order mark.

    Args:
        path: The file.
        text: How it is written.

    Raises:
        InputError: Another encoding (with the line), one that Python does not know, or damaged.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path} is damaged or truncated: copy it again") from None
    codec = text.codec or _marked(data)
    try:
        return data.decode(codec).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise text.wrong(path, data[: error.start].decode(codec, "ignore").count("\n") + 1) from None


def read_json_lines(path: Path, text: TextFormat = PLAIN) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the objects of a JSON-lines file, perhaps ``.gz``, one by one, each with the number of its line.

    Args:
        path: The file; blank lines are passed over.
        text: How it is written.

    Raises:
        InputError: A line is not a JSON object, or the file is truncated; names the line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            codec = text.codec or _marked(file.peek(4))
            wide = codec.startswith(("utf-16", "utf-32"))  # whose line ends are no single bytes
            lines = io.TextIOWrapper(file, codec, newline="\n") if wide else (line.decode(codec) for line in file)
            for line in lines:
                number += 1
                bare = line.removeprefix("\ufeff").strip()
                if bare:
                    found = json.loads(bare)
                    if not isinstance(found, dict):
                        raise ValueError(f"{bare[:20]!r} is none")
                    yield number, found
    except UnicodeDecodeError:
        raise text.wrong(path, number + 1) from None
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not a JSON object ({error}): write one on each line") from None
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: damaged or truncated ({error}): copy it again") from None


def _marked(beginning: bytes) -> str:
    return next((codec for mark, codec in _MARKS if beginning.startswith(mark)), "utf-8")


def _separator_of(header: str, path: Path, text: TextFormat) -> str:
    """The one that is named, else the one that the header holds most often, outside of quotes."""
    if text.separator == "":
        raise InputError(
            f"{text.prefix}separator is empty: give the text between two values, such as ';', or null to have it found"
        )
    if text.separator is not None:
        return "\t" if text.separator == r"\t" else text.separator
    bare = "".join(header.split('"')[::2])
    counts = {separator: bare.count(separator) for separator in SEPARATORS}
    likely = [separator for separator, count in counts.items() if count and count == max(counts.values())]
    if len(likely) > 1:
        raise InputError(
            f"{path}, line 1: the separator may be {' or '.join(map(repr, likely))}: "
            f"{'write one of them' if text.prefix is None else f'set {text.prefix}separator to it'}"
        )
    return likely[0] if likely else ","


def _separated_table(path: Path, format: TextFormat) -> Table:
    text = read_text(path, format)
    separator = _separator_of(text.partition("\n")[0], path, format)
    longer = len(separator) > 1
    if longer:
        text = text.replace(separator, _ONE_CHARACTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with too many fields
        frame = pd.read_csv(
            io.StringIO(text),
            sep=_ONE_CHARACTER if longer else separator,
            dtype=str,
            keep_default_na=False,
            index_col=False,
            skip_blank_lines=False,
        )
    if longer:  # what stood inside of quotes is put back
        frame = frame.apply(lambda cells: cells.str.replace(_ONE_CHARACTER, separator, regex=False))
    frame = frame.rename(columns=lambda name: name.replace(_ONE_CHARACTER, separator).strip())
    table = Table(str(path), frame, has_header=True)
    blank = np.logical_and.reduce([frame[name].fillna("").eq("").to_numpy() for name in frame])
    return table.keep(~blank) if blank.any() else table


def _json_table(path: Path, text: TextFormat) -> Table:
    numbers: list[int] = []
    rows: list[dict[str, Any]] = []
    for number, row in read_json_lines(path, text):
        numbers.append(number)
        rows.append(row)
    frame = pd.DataFrame(rows, dtype=object)
    return Table(str(path), frame, has_header=True, lines=np.array(numbers, dtype=np.int64))


def _read_parquet(path: Path) -> pd.DataFrame:
    """Whole numbers stay whole beside missing ones, so that long ids keep all their digits."""
    import pyarrow.parquet

    frame: pd.DataFrame = pyarrow.parquet.read_table(path).to_pandas(integer_object_nulls=True)
    return frame
