"""The table of samples and the catalogue of items: pure numpy and pandas."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.utils.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
NO_ITEM = -1
T = TypeVar("T", bound=np.generic)


def digest(values: Iterable[str]) -> str:
    """Computes the SHA-256 (hex) of an ordered list of strings, each followed by a newline."""
    return hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()


def gather_padded(
    values: npt.NDArray[T], begin: IntArray, end: IntArray, *, left: bool, fill: float = NO_ITEM
) -> npt.NDArray[T]:
    """Gathers the rows ``values[begin:end]`` into one array, padded on the left or on the right.

    Args:
        values: [M] values.
        begin: [B] first positions.
        end: [B] positions after the last.
        left: Pad on the left, else on the right.
        fill: What to pad with.

    Returns:
        [B, max(end - begin)], of the type of `values`.
    """
    width = int((end - begin).max(initial=0))
    steps = np.arange(width)
    positions = (end[:, None] - width + steps) if left else (begin[:, None] + steps)
    inside = (positions >= begin[:, None]) & (positions < end[:, None])
    return np.where(inside, values[np.where(inside, positions, 0)], values.dtype.type(fill))


class Catalogue:
    """All items that can be recommended. The order is that of the source and never depends on a split.

    Args:
        item_ids: External ids, all different; the item index is the position.
        titles: A title for each item, or None; an empty one becomes the id.
        texts: What encoders read of each item, or None; an empty one becomes the title or, without one, the id.

    Attributes:
        texts: A text for each item, never empty.
        interactions: Gives user and item of the train part, [n, 2] int64; None where there is no log.

    Raises:
        InputError: No item, an id that comes twice, or another number of titles or texts.

    Example:
        >>> catalogue = Catalogue(["b", "a"], ["Bee", "Ape"])
        >>> len(catalogue), catalogue.index_of("a"), catalogue.titles[1]
        (2, 1, 'Ape')
    """

    interactions: Callable[[], IntArray] | None = None

    def __init__(
        self, item_ids: Sequence[str], titles: Sequence[str] | None = None, texts: Sequence[str] | None = None
    ) -> None:
        self.item_ids = list(item_ids)
        self._index = {item_id: index for index, item_id in enumerate(self.item_ids)}
        if not self.item_ids:
            raise InputError("the catalogue has no items: give at least one")
        if len(self._index) < len(self.item_ids):
            twice = next(item_id for index, item_id in enumerate(self.item_ids) if self._index[item_id] != index)
            raise InputError(f"the item {twice!r} is in the catalogue twice: keep one of its rows")
        for what, given in (("titles", titles), ("texts", texts)):
            if given is not None and len(given) != len(self.item_ids):
                raise InputError(f"{len(given)} {what} for {len(self.item_ids)} items: give one for each item")
        self.titles = (
            None if titles is None else [title or own for title, own in zip(titles, self.item_ids, strict=True)]
        )
        names = self.titles or self.item_ids
        self.texts = [*names] if texts is None else [text or name for text, name in zip(texts, names, strict=True)]

    def __deepcopy__(self, memo: dict[int, object]) -> "Catalogue":
        return self  # never changed, and shared by a policy and its reference

    def __len__(self) -> int:
        return len(self.item_ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._index

    def index_of(self, item_id: str) -> int:
        """Looks up the item index of an external id.

        Raises:
            InputError: The id is not in the catalogue.
        """
        try:
            return self._index[item_id]
        except KeyError:
            raise InputError(
                f"the item {item_id!r} is not in the catalogue of {len(self)} items: give the id of one that is"
            ) from None

    def indices_of(self, item_ids: Sequence[str]) -> IntArray:
        """Looks up the item indices of external ids, int64 [n]; -1 where the catalogue does not have one."""
        index = pd.Index(self.item_ids, dtype=object)
        return index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the ordered external ids: equal fingerprints mean equal item indices."""
        return digest(self.item_ids)


class SampleTable:
    """All interactions sorted by (timestamp, source row); the row number in that order is the ``sample_id``.

    A sample asks for its own item (the target) given what the same user did at strictly earlier timestamps. Nothing
    here depends on a seed, a split or a history window.

    Args:
        user_ids: External user id of each interaction, [N] in source order.
        items: Item index of each interaction, [N] in source order.
        timestamps: Unix seconds of each interaction, [N] in source order.
        n_items: Size of the catalogue.
        ratings: What the user said of each item, [N] in source order, NaN where unknown; None where there are none.
        parts: What each interaction is for, where the source says so, [N] in source order: ``train``, ``validation``
            or ``test``.

    Attributes:
        user_ids: External ids of the users, [n_users], by first appearance in time.
        user: User index, [N] int64.
        item: Item index of the target, [N] int64.
        timestamp: Unix seconds, [N] float64, never decreasing.
        rating: [N] float32, NaN where unknown, or None.
        part: [N] of str, or None.
        source_row: Row in the source, [N] int64.
        n_earlier: Number of interactions of the same user at strictly earlier timestamps, [N] int64.
        repeated: The user had this very item at a strictly earlier timestamp, [N] bool.
        eligible: There is a history and the target is not ``repeated`` (the mask of seen items would hide it), [N]
            bool.

    Raises:
        InputError: No interaction at all.

    Example:
        >>> table = SampleTable(["u", "u", "u"], [2, 0, 1], [30.0, 10.0, 20.0], n_items=3)
        >>> table.item.tolist(), table.history(2).tolist(), table.history(2, window=1).tolist()
        ([0, 1, 2], [0, 1], [1])
    """

    def __init__(
        self,
        user_ids: Sequence[str],
        items: Sequence[int] | IntArray,
        timestamps: Sequence[float] | FloatArray,
        n_items: int,
        ratings: Sequence[float] | FloatArray | None = None,
        parts: Sequence[str] | None = None,
    ) -> None:
        if len(user_ids) == 0:
            raise InputError("there are no interactions: give a table with at least one row")
        source_time = np.asarray(timestamps, dtype=np.float64)
        by_time = np.argsort(source_time, kind="stable")
        self.source_row: IntArray = by_time.astype(np.int64)
        self.n_items = n_items
        self.timestamp: FloatArray = source_time[by_time]
        self.item: IntArray = np.asarray(items, dtype=np.int64)[by_time]
        self.rating = None if ratings is None else np.asarray(ratings, dtype=np.float32)[by_time]
        self.part = None if parts is None else np.asarray(parts, dtype=np.str_)[by_time]
        codes, uniques = pd.factorize(np.asarray(user_ids, dtype=object)[by_time])
        self.user: IntArray = codes.astype(np.int64)
        self.user_ids: list[str] = [str(user_id) for user_id in uniques]
        self._index_users()

    def _index_users(self) -> None:
        """Group the rows by user (`rows`), remember where each user begins and what each row may know."""
        n = len(self.user)
        self.rows: IntArray = np.argsort(self.user, kind="stable").astype(np.int64)
        user, time, item = self.user[self.rows], self.timestamp[self.rows], self.item[self.rows]
        begins = np.searchsorted(user, np.arange(len(self.user_ids) + 1)).astype(np.int64)
        new_moment = np.ones(n, dtype=bool)
        new_moment[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
        moment_begins = np.maximum.accumulate(np.where(new_moment, np.arange(n), 0))

        pair = user * self.n_items + item
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        is_first = np.zeros(n, dtype=bool)
        is_first[first] = True

        self.user_begins = begins
        self.grouped_item, self.grouped_time = item, time
        self.grouped_rating = None if self.rating is None else self.rating[self.rows]
        self.history_begin = np.empty(n, dtype=np.int64)
        self.history_end = np.empty(n, dtype=np.int64)
        self.repeated: BoolArray = np.empty(n, dtype=bool)
        self.history_begin[self.rows] = begins[user]
        self.history_end[self.rows] = moment_begins
        self.repeated[self.rows] = time[first[inverse]] < time
        self.n_earlier: IntArray = self.history_end - self.history_begin
        self.eligible: BoolArray = (self.n_earlier > 0) & ~self.repeated
        self.distinct_item = item[is_first]
        distinct_before = np.concatenate([[0], np.cumsum(is_first)]).astype(np.int64)
        self.seen_begin = distinct_before[self.history_begin]
        self.seen_end = distinct_before[self.history_end]

    def __len__(self) -> int:
        return len(self.user)

    def interactions(self, sample_ids: IntArray) -> IntArray:
        """User and item of each of these samples, [n, 2] int64."""
        return np.stack([self.user[sample_ids], self.item[sample_ids]], axis=1)

    def item_counts(self, sample_ids: IntArray) -> IntArray:
        """Counts how often each item is the target of these samples, [n_items] int64."""
        return np.bincount(self.item[sample_ids], minlength=self.n_items).astype(np.int64)

    def history(self, sample_id: int, window: int | None = None) -> IntArray:
        """Returns the last ``window`` items (None: all) of earlier timestamps, latest last, [<= window] int64."""
        begin, end = int(self.history_begin[sample_id]), int(self.history_end[sample_id])
        return self.grouped_item[begin if window is None else max(begin, end - window) : end]

    def seen(self, sample_id: int) -> IntArray:
        """Returns the different items of strictly earlier timestamps, by first appearance, int64: what is masked."""
        return self.distinct_item[self.seen_begin[sample_id] : self.seen_end[sample_id]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of users, items and times in order: equal fingerprints mean equal sample_ids."""
        arrays = (self.user, self.item, self.timestamp)
        return hashlib.sha256(
            digest(self.user_ids).encode() + b"".join(array.tobytes() for array in arrays)
        ).hexdigest()
