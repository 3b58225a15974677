"""What an artifact was made for, as facts: short texts by name, kept with it and compared when it is used again.

A fact is a text. Where it ends with ` #` and 16 hex digits, those alone are compared and the rest is for people. A
table gives a fact for each column, a digest, and one for its rows: 24 bits for each of them, by which the first row
that differs is named. Of more than 131,072 rows neighbours share these bits, so that they take half a MiB at most.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minirec_pl.utils.errors import InputError

Hashes = npt.NDArray[np.uint64]
Facts = Mapping[str, str]
COUNT, ROWS = "count", "rows"
REMEDY = (
    "use what it was made for, or allow the change with --allow_changed_data=true (trainer.allow_changed_data = True)"
)
_DIGEST = re.compile(r"(?s)(.*) #([0-9a-f]{16})")
_MOST_ROWS = 2**17
_BITS = np.uint64(2**24 - 1)
_SHOWN = 60


def fact(text: str, *hidden: bytes) -> str:
    """Makes a fact of a text and of what is too long to be kept.

    Args:
        text: for people; it is compared only where nothing is hidden.
        hidden: what the fact stands for.

    Example:
        >>> fact("9 samples", b"1 2 3")
        '9 samples #cdd63cdc2cf71b7f'
    """
    sha = hashlib.sha256()
    for part in hidden or (text.encode(),):
        sha.update(hashlib.sha256(part).digest())
    return f"{text} #{sha.hexdigest()[:16]}"


def settings_of(part: Any) -> str:
    """Names an object by its class, with its numbers, texts and switches, such as `NDCGReward(k=10)`."""
    own = vars(part) if hasattr(part, "__dict__") else {}
    plain = {name: value for name, value in own.items() if isinstance(value, str | int | float) and name[0] != "_"}
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(plain.items()))})"


class Column:
    """A column of a table that is to be told from another.

    Args:
        label: what a value is, such as "target item".
        values: the different values, texts or numbers.
        index: int64 [N], which of them each row has; None for a value a row.
        hashes: uint64 [N], of values that have no words.
    """

    def __init__(
        self,
        label: str,
        values: Sequence[str] | npt.NDArray[Any] = (),
        index: npt.NDArray[np.int64] | None = None,
        hashes: Hashes | None = None,
    ) -> None:
        self.label, self.values, self.index = label, values, index
        self._of_values = _hashes(values) if hashes is None else hashes
        self.worded = hashes is None

    def hashes(self) -> Hashes:
        """Returns the hash of each row, uint64 [N]."""
        return self._of_values if self.index is None else self._of_values[self.index]

    def words(self, row: int) -> str:
        """Returns the value of a row in words."""
        return _words(self.values[row if self.index is None else self.index[row]])

    def value_with(self, lane: np.uint64) -> str | None:
        """Returns the only value, in words, that gives a row these bits; None without one."""
        found: Sequence[int] = np.flatnonzero(_lane(self._of_values) == lane).tolist() if self.worded else []
        different = {_words(self.values[place]) for place in found}
        return different.pop() if len(different) == 1 else None


@dataclass
class Table:
    """Rows that an artifact depends on.

    Attributes:
        columns: by name, N rows each.
        one: names a row, such as "sample 17 of the pool".
        many: what the rows are, such as "samples".
    """

    columns: Mapping[str, Column]
    one: Callable[[int], str]
    many: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).hashes())

    def old_value(self, row: int, column: str, bits: int) -> str | None:
        """Finds the value, in words, that a column must have had in a row for these bits; None if there is not one."""
        mine = self.columns[column]
        others = [int(_lane(other.hashes()[row : row + 1])[0]) for other in self.columns.values() if other is not mine]
        return mine.value_with(np.uint64((bits - sum(others)) & int(_BITS)))

    def facts(self) -> dict[str, str]:
        """Returns the number of rows, a digest of each column and the bits of the rows."""
        lanes = np.zeros(len(self), dtype=np.uint64)
        digests = {}
        for name, column in self.columns.items():
            hashes = column.hashes()
            digests[name] = hashlib.sha256(hashes.tobytes()).hexdigest()[:32]
            lanes += _lane(hashes)
        block = max(1, -(-len(lanes) // _MOST_ROWS))
        if block > 1:
            placed = mixed(lanes + (np.arange(len(lanes), dtype=np.uint64) << np.uint64(32)))
            lanes = np.add.reduceat(placed, np.arange(0, len(lanes), block))
        bits = lanes.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        return {COUNT: str(len(self)), **digests, ROWS: f"{block}:{base64.b64encode(bits.tobytes()).decode()}"}


def _no_tables() -> Mapping[str, Table]:
    return {}


@dataclass
class Identity:
    """What an artifact that is made now would be made for.

    Attributes:
        facts: by name; those of a table begin with its name and a dot.
        tables: gives what is needed to name a row that differs.
    """

    facts: dict[str, str] = field(default_factory=dict)
    tables: Callable[[], Mapping[str, Table]] = _no_tables

    @classmethod
    def of(cls, parts: Sequence[Identity]) -> Identity:
        """Joins several."""
        facts = {name: value for part in parts for name, value in part.facts.items()}
        return cls(facts, lambda: {name: table for part in parts for name, table in part.tables().items()})

    def only(self, names: Collection[str]) -> Identity:
        """Keeps the facts and tables of these names."""
        kept = {name: value for name, value in self.facts.items() if name.partition(".")[0] in names}
        return Identity(kept, self.tables)

    def brief(self) -> dict[str, str]:
        """Returns the facts without the bits of the samples, which are the largest."""
        return {name: value for name, value in self.facts.items() if name != f"samples.{ROWS}"}

    def differences(self, stored: Facts) -> list[str]:
        """Says what is different here from what something was made for; what that does not tell is left out.

        Args:
            stored: its facts.

        Returns:
            A clause for each difference.
        """
        return list(self._differences(stored))

    def _differences(self, stored: Facts) -> Iterator[str]:
        own = {name.partition(".")[0] for name in self.facts if name.endswith(f".{COUNT}")}
        tables = {name for name in own if f"{name}.{COUNT}" in stored}
        for name in self._in_order(tables):
            here, there = self._columns(self.facts, name), self._columns(stored, name)
            changed = [c for c in {**here, **there} if c not in (COUNT, ROWS) and here.get(c) != there.get(c)]
            if here[COUNT] != there[COUNT] or changed:
                yield _of_rows(name, self.tables().get(name), here, there, changed)
        for name, value in self.facts.items():
            if name.partition(".")[0] in own or name not in stored:
                continue
            (here_text, here_digest), (there_text, there_digest) = _parts(value), _parts(stored[name])
            if here_digest == there_digest:
                continue
            label = name.replace("_", " ")
            many = label.endswith("s")
            if here_text == there_text or max(len(here_text), len(there_text)) > _SHOWN:
                yield f"the {label} differ{'' if many else 's'}"
            else:
                here_text, there_text = (repr(t) if "\n" in t else t for t in (here_text, there_text))
                yield f"the {label} {'are' if many else 'is'} {here_text} here and {there_text} there"

    def _in_order(self, names: Collection[str]) -> list[str]:
        return list(dict.fromkeys(part for name in self.facts if (part := name.partition(".")[0]) in names))

    @staticmethod
    def _columns(facts: Facts, table: str) -> dict[str, str]:
        start = f"{table}."
        return {name.removeprefix(start): value for name, value in facts.items() if name.startswith(start)}


def refuse_changed(what: str, differences: Sequence[str], remedy: str = REMEDY) -> None:
    """Refuses what was made for something else.

    Args:
        what: is wrong, such as "the checkpoint was made for something else".
        differences: see `Identity.differences`; nothing happens without one.
        remedy: what to do.

    Raises:
        InputError: naming the first difference.
    """
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise InputError(f"{what} ({differences[0]}{more}): {remedy}")


def _of_rows(name: str, table: Table | None, here: Facts, there: Facts, changed: Sequence[str]) -> str:
    """A clause on the first row that differs, or on how many rows there are."""
    many, one = (name, f"row {{}} of the {name}".format) if table is None else (table.many, table.one)
    if here[COUNT] != there[COUNT]:
        return f"there are {int(here[COUNT]):,} {many} here and {int(there[COUNT]):,} there"
    columns = {} if table is None else table.columns
    what = " and ".join(columns[column].label if column in columns else column for column in changed)
    (block, old), (own_block, own) = _bits_of(there.get(ROWS, "1:")), _bits_of(here.get(ROWS, "1:"))
    if block != own_block or len(old) != len(own) or not (old != own).any():
        return f"some {many} have another {what}"
    place = int(np.argmax(old != own))
    row, last = place * block, min((place + 1) * block, int(here[COUNT])) - 1
    if last > row:
        return f"one from {one(row)} to {one(last)} has another {what}"
    column = columns.get(changed[0])
    if table is None or len(changed) > 1 or column is None or not column.worded:
        return f"{one(row)} has another {what}"
    value = table.old_value(row, changed[0], int(old[place]))
    there_text = "another" if value in (None, column.words(row)) else value
    return f"{one(row)} has the {column.label} {column.words(row)} here and {there_text} there"


def _bits_of(text: str) -> tuple[int, Hashes]:
    block, _, encoded = text.partition(":")
    bits = np.frombuffer(base64.b64decode(encoded), dtype=np.uint8).reshape(-1, 3)
    return int(block), np.pad(bits, ((0, 0), (0, 1))).copy().view("<u4")[:, 0].astype(np.uint64)


def figures_fact(facts: Facts, part: str) -> str | None:
    """Returns a digest of what the figures of a part (validation or test) depend on; None where it is not known."""
    columns = ("count", "user", "time", "target", "rating", "history")
    names = ["catalogue.item", *(f"samples.{name}" for name in columns), part]
    known = {name: _parts(facts[name])[1] for name in names if name in facts}
    return fact(part, json.dumps(known).encode()).rpartition("#")[2] if part in known else None


def _parts(value: str) -> tuple[str, str]:
    """What of a fact is for people, and what is compared."""
    found = _DIGEST.fullmatch(value)
    return (found[1], found[2]) if found else (value, value)


def _words(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
    return f"{float(value):.15g}"


def _hashes(values: Sequence[str] | npt.NDArray[Any]) -> Hashes:
    if isinstance(values, np.ndarray):
        numbers = np.where(np.isnan(values), np.nan, values).astype(np.float64) + 0.0
        return numbers.view(np.uint64)
    content = b"".join(hashlib.blake2b(value.encode(), digest_size=8).digest() for value in values)
    return np.frombuffer(content, dtype="<u8").astype(np.uint64)


def mixed(x: Hashes) -> Hashes:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _lane(hashes: Hashes) -> Hashes:
    return mixed(hashes + np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
