"""Further columns of interactions and items, which rewards ask for by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.data.columns import Columns

Values = npt.NDArray[Any]
Owner = Literal["sample", "interaction", "target", "recommended", "history"]
OWNERS: Final[tuple[Owner, ...]] = ("interaction", "target", "recommended", "history")
_NO_TEXT: Final = frozenset({"", "nan", "nat", "none", "null", "<na>", r"\n", "na", "n/a"})
_HIDDEN: Final = (  # ids of items have columns of their own, the rest is what samples are made of
    Columns.ITEM_ID,
    Columns.SPLIT,
    Columns.HISTORY_ITEM_ID,
    Columns.HISTORY_RATING,
    Columns.HISTORY_TIMESTAMP,
)


class Place(NamedTuple):
    """What a name means: a column, of what it is taken."""

    owner: Owner
    column: str


@dataclass(frozen=True)
class OwnColumns:
    """Columns of a data set, of which only those are kept that are asked for.

    A name is a column of the target's interaction, else of the target item; ``interaction_``, ``target_``,
    ``recommended_`` and ``history_`` before a column say which is meant.

    Attributes:
        interaction_names: All columns of the interactions.
        item_names: All columns of the items.
        interactions: Columns that are kept, [n_samples] each, by sample_id.
        items: Columns that are kept, [n_items] each, by item index.

    Example:
        >>> frame = pd.DataFrame({"price": ["2.5", ""], "brand": ["x", "y"]})
        >>> own = OwnColumns.keep(pd.DataFrame(), frame, {"recommended_price"})
        >>> own.places("recommended_price"), values_at(own.items["price"], np.array([0, 1])), own.items.keys()
        ([Place(owner='recommended', column='price')], [2.5, None], dict_keys(['price']))
    """

    interaction_names: tuple[str, ...] = ()
    item_names: tuple[str, ...] = ()
    interactions: Mapping[str, Values] = field(default_factory=dict)
    items: Mapping[str, Values] = field(default_factory=dict)

    @classmethod
    def keep(cls, interactions: pd.DataFrame, items: pd.DataFrame, wanted: Collection[str]) -> OwnColumns:
        """Keeps of two frames, in the order of sample_ids and of the catalogue, what some names mean."""
        of_interactions, of_items = (
            tuple(str(name) for name in frame if str(name).isidentifier() and name not in _HIDDEN)
            for frame in (interactions, items)
        )
        places = {place for name in wanted for place in cls(of_interactions, of_items).places(name)}
        kept = {(owner == "interaction", column) for owner, column in places}
        return cls(
            of_interactions,
            of_items,
            {name: as_values(interactions[name]) for name in of_interactions if (True, name) in kept},
            {name: as_values(items[name]) for name in of_items if (False, name) in kept},
        )

    def places(self, name: str) -> list[Place]:
        """Finds all that a name may mean; none for an unknown name, several for one that is not clear."""
        found = [Place("interaction", name)] if name in self.interaction_names else []
        found += [Place("target", name)] if name in self.item_names else []
        for owner in OWNERS:
            column = name.removeprefix(f"{owner}_")
            names = self.interaction_names if owner == "interaction" else self.item_names
            if column != name and column in names:
                found.append(Place(owner, column))
        return found

    def described(self) -> str:
        """Lists the names that can be asked for, in words."""
        texts = []
        if self.interaction_names:
            texts.append(f"of the interactions: {', '.join(self.interaction_names)}")
        if self.item_names:
            texts.append(
                f"of the items, with target_, recommended_ or history_ before them: {', '.join(self.item_names)}"
            )
        return "; ".join(texts)


def as_values(column: pd.Series[Any]) -> Values:
    """Makes values of a column for :func:`values_at`; texts that are all numbers become numbers, but not "007".

    Args:
        column: Of a table, as it was read.
    """
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        given = [None if _is_missing(value) else value for value in column]
        present = [value for value in given if value is not None and not _is_no_number(value)]
        if not present or not all(map(_is_number, present)):
            values = np.empty(len(given), dtype=object)
            values[:] = [value.tolist() if isinstance(value, np.ndarray) else value for value in given]
            return values
        column = pd.Series([None if _is_no_number(value) else value for value in given], dtype=object)
    numbers: Values = pd.to_numeric(column).to_numpy()
    return numbers.astype(np.float64) if numbers.dtype == object else numbers


def values_at(values: Values, rows: npt.NDArray[np.int64]) -> list[Any]:
    """Looks up Python values, None where one is missing.

    Args:
        values: Of :func:`as_values`.
        rows: Their places, [n].
    """
    return [None if value != value else value for value in values[rows].tolist()]


def _is_missing(value: Any) -> bool:
    return (pd.api.types.is_scalar(value) and bool(pd.isna(value))) or (isinstance(value, str) and not value.strip())


def _is_no_number(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NO_TEXT)


def _is_number(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))
    text = value.strip().lstrip("-")
    if not text[:1].isdigit() and text[:1] != ".":
        return False
    return bool(np.isfinite(pd.to_numeric(text, errors="coerce"))) and not (text[0] == "0" and text[1:2].isdigit())
