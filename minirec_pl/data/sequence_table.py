"""Ready-made sequences: samples that bring their own history; pure numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from minirec_pl.data.samples import FloatArray, IntArray, SampleTable, gather_padded

T = TypeVar("T", bound=np.generic)


class SequenceTable(SampleTable):
    """Samples whose histories are given, not derived: they may be truncated, overlap, or say nothing of time.

    The row number in the order of (timestamp, source row) is the ``sample_id``, as in :class:`SampleTable`, whose
    attributes it has. ``seen`` is what the own history holds, and a sample is eligible if it has a history that does
    not hold the target.

    Args:
        user_ids: External user id of each sample, [N] in source order.
        items: Item index of each target, [N] in source order.
        histories: Item indices of each history, oldest first, [N] arrays.
        n_items: Size of the catalogue.
        timestamps: Unix seconds of each target, [N]; None: the source order is the time order.
        ratings: As of :class:`SampleTable`.
        parts: As of :class:`SampleTable`.
        history_times: Unix seconds beside ``histories``; None where unknown, all ages are then NaN.
        history_ratings: Ratings beside ``histories``, NaN where unknown; None where there are none.

    Raises:
        InputError: No sample at all.

    Example:
        >>> table = SequenceTable(["u", "v"], [2, 0], [[0, 1], [1]], 3)
        >>> table.history(0).tolist(), table.item.tolist(), table.eligible.tolist()
        ([0, 1], [2, 0], [True, True])
    """

    def __init__(
        self,
        user_ids: Sequence[str],
        items: Sequence[int] | IntArray,
        histories: Sequence[Sequence[int] | IntArray],
        n_items: int,
        *,
        timestamps: Sequence[float] | FloatArray | None = None,
        ratings: Sequence[float] | FloatArray | None = None,
        parts: Sequence[str] | None = None,
        history_times: Sequence[FloatArray] | None = None,
        history_ratings: Sequence[FloatArray] | None = None,
    ) -> None:
        self._histories, self._history_times, self._history_ratings = histories, history_times, history_ratings
        times = np.arange(len(user_ids), dtype=np.float64) if timestamps is None else timestamps
        super().__init__(user_ids, items, times, n_items, ratings, parts)
        del self._histories, self._history_times, self._history_ratings

    def _index_users(self) -> None:
        histories = [np.asarray(self._histories[row], dtype=np.int64) for row in self.source_row]
        self.rows = np.argsort(self.user, kind="stable").astype(np.int64)
        self.user_begins = np.searchsorted(self.user[self.rows], np.arange(len(self.user_ids) + 1)).astype(np.int64)
        self.n_earlier = np.array([len(history) for history in histories], dtype=np.int64)
        self.history_end = np.cumsum(self.n_earlier)
        self.history_begin = self.history_end - self.n_earlier
        self.grouped_item = _joined(histories)
        self.grouped_time = np.full(len(self.grouped_item), np.nan)
        if self._history_times is not None:
            self.grouped_time = _joined([self._history_times[row] for row in self.source_row])
        self.grouped_rating = None
        if self._history_ratings is not None:
            ratings = _joined([self._history_ratings[row] for row in self.source_row])
            self.grouped_rating = ratings.astype(np.float32)
        distinct = [np.array(list(dict.fromkeys(history.tolist())), dtype=np.int64) for history in histories]
        self.distinct_item = _joined(distinct)
        self.seen_end = np.cumsum([len(items) for items in distinct]).astype(np.int64)
        self.seen_begin = self.seen_end - np.array([len(items) for items in distinct], dtype=np.int64)
        self.repeated = np.array([item in history for item, history in zip(self.item, histories, strict=True)])
        self.eligible = (self.n_earlier > 0) & ~self.repeated

    def interactions(self, sample_ids: IntArray) -> IntArray:
        """User and item of each target and history item of these samples, each pair once, [n, 2] int64."""
        n_earlier = self.n_earlier[sample_ids]
        begin, end = self.history_begin[sample_ids], self.history_end[sample_ids]
        history = gather_padded(self.grouped_item, begin, end, left=False)
        users = np.concatenate([self.user[sample_ids].repeat(n_earlier), self.user[sample_ids]])
        items = np.concatenate([history[history >= 0], self.item[sample_ids]])
        return np.stack(np.divmod(np.unique(users * self.n_items + items), self.n_items), axis=1).astype(np.int64)

    def item_counts(self, sample_ids: IntArray) -> IntArray:
        """Counts the users that have each item as target or in the history of these samples, [n_items] int64."""
        return np.bincount(self.interactions(sample_ids)[:, 1], minlength=self.n_items).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of users, items, times and histories in order."""
        own = b"".join(array.tobytes() for array in (self.grouped_item, self.history_end))
        return hashlib.sha256(super().fingerprint.encode() + own).hexdigest()


def _joined(arrays: Sequence[npt.NDArray[T]]) -> npt.NDArray[T]:
    joined: npt.NDArray[T] = np.concatenate(arrays)
    return joined
