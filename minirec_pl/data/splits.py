"""Which samples are for the warm start, the pool, validation and test."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from minirec_pl.data.samples import (
    IntArray,
    SampleTable,
    TimeSplit,
    check_warm_fraction,
    cut_forward,
    split_by_time,
    window_rows,
)
from minirec_pl.utils.errors import InputError

Split = tuple[float, float, float] | Literal["leave_one_out", "given"]
CARVED_VALIDATION = 0.1
LEAVE_ONE_OUT_LEAK = (
    "leave-one-out leaks the future: what is trained on holds interactions later than the targets of other users' "
    "validation and test samples; a split in global time does not"
)


class Parts(NamedTuple):
    """All sample_ids of each part, ascending, int64; those that are not eligible among them."""

    warm: IntArray
    pool: IntArray
    validation: IntArray
    test: IntArray


def split_table(
    table: SampleTable, split: Split, warm_fraction: float, window: tuple[float, float] | None = None
) -> tuple[Parts, TimeSplit | None]:
    """Splits the samples into warm part, pool, validation and test.

    Args:
        table: The samples, sorted by time.
        split: Shares in global time, ``leave_one_out`` or ``given``.
        warm_fraction: Share of the train part, earliest first, that is kept for the warm start; the cut moves forward
            to the next timestamp.
        window: Stretch of global time that the parts are cut from, see :func:`split_by_time`; None: all of it.

    Returns:
        The parts, and their cuts where they are stretches of time.

    Raises:
        InputError: An unknown split, shares out of range, no part is given in the data, or a window where the parts are
            no stretches of time.
    """
    if not isinstance(split, str):
        window = window or (0.0, 1.0)
        cuts = split_by_time(table, split, warm_fraction=warm_fraction, window=window)
        borders = pairwise((window_rows(table, window)[0], *cuts))
        return Parts(*(np.arange(begin, end) for begin, end in borders)), cuts
    if window is not None:
        raise InputError(
            f"window={list(window)} does not fit split={split!r}: give a split in global time, such as [0.8, 0.1, 0.1]"
        )
    check_warm_fraction(warm_fraction)
    if split == "leave_one_out":
        train, validation, test = leave_one_out(table)
    elif split == "given":
        train, validation, test = given_parts(table)
    else:
        raise InputError(f"split={split!r}: give three shares of time, 'leave_one_out' or 'given'")
    cut = cut_forward(table.timestamp[train], len(train) * warm_fraction)
    return Parts(train[:cut], train[cut:], validation, test), None


def leave_one_out(table: SampleTable) -> tuple[IntArray, IntArray, IntArray]:
    """Keeps each user's last sample for test and the one before for validation, if there are at least three.

    All else is train. This leaks the future, see ``LEAVE_ONE_OUT_LEAK``; it is there because much of the literature
    splits so.

    Returns:
        sample_ids of train, validation and test, ascending.
    """
    begins, ends = table.user_begins[:-1], table.user_begins[1:]
    last = ends[ends - begins >= 3] - 1
    validation, test = np.sort(table.rows[last - 1]), np.sort(table.rows[last])
    train = np.setdiff1d(np.arange(len(table)), np.concatenate([validation, test]))
    return train, validation, test


def given_parts(table: SampleTable) -> tuple[IntArray, IntArray, IntArray]:
    """Reads the parts that the data name; without validation, the latest tenth of train becomes that.

    The cut moves forward to the next timestamp.

    Returns:
        sample_ids of train, validation and test, ascending.

    Raises:
        InputError: The data have no column ``split``.
    """
    if table.part is None:
        raise InputError(
            "split='given' needs a column 'split' (train, validation, test) in the data: add it, or name it in columns"
        )
    train, validation, test = (np.flatnonzero(table.part == name) for name in ("train", "validation", "test"))
    if len(validation) == 0:
        cut = cut_forward(table.timestamp[train], len(train) * (1 - CARVED_VALIDATION))
        train, validation = train[:cut], train[cut:]
    return train, validation, test


def random_part(ids: IntArray, size: int | None, seed: int) -> IntArray:
    """Draws a random subset of at most ``size`` ids, ascending; all of them where size is None."""
    if size is None or size >= len(ids):
        return ids
    return np.sort(np.random.default_rng(seed).choice(ids, size, replace=False))
