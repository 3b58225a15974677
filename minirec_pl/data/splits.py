"""Which samples are for the warm start, the pool, validation and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from minirec_pl.data.samples import FloatArray, IntArray, SampleTable
from minirec_pl.utils.errors import InputError

Split = tuple[float, float, float] | Literal["leave_one_out", "given"]
CARVED_VALIDATION = 0.1
LEAVE_ONE_OUT_LEAK = (
    "leave-one-out leaks the future: what is trained on holds interactions later than the targets of other users' "
    "validation and test samples; a split in global time does not"
)


class TimeSplit(NamedTuple):
    """Cuts in sample_ids: warm [0, warm_end), pool [warm_end, train_end), validation up to val_end, test up to end.

    With a window of time the warm part begins where that does.
    """

    warm_end: int
    train_end: int
    val_end: int
    end: int


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


def window_rows(table: SampleTable, window: tuple[float, float]) -> tuple[int, int]:
    """Finds where a window of time begins and ends, in sample_ids; like every cut, at the next timestamp.

    Args:
        table: The samples, sorted by time.
        window: Begin and end, as shares of the samples in time order.

    Raises:
        InputError: Not two shares, the first below the second.
    """
    if len(window) != 2 or not 0 <= window[0] < window[1] <= 1:
        raise InputError(
            f"window={list(window)}: give begin and end as shares of the samples in time order, such as [0.2, 0.8]"
        )
    begin, end = (cut_forward(table.timestamp, len(table) * share) for share in window)
    return begin, end


def split_by_time(
    table: SampleTable,
    ratios: Sequence[float] = (0.8, 0.1, 0.1),
    *,
    warm_fraction: float = 0.0,
    window: tuple[float, float] = (0.0, 1.0),
) -> TimeSplit:
    """Cuts the samples in time; a cut moves forward to the next timestamp, so no timestamp is in two parts.

    Args:
        table: The samples, sorted by time.
        ratios: Shares of train, validation and test, each above 0, together 1.
        warm_fraction: Share of the train part, from its start, that is kept for the warm start, 0 to 1.
        window: The stretch of time that is cut, as shares of the samples in time order: (0.2, 0.8) leaves the earliest
            and the latest fifth out.

    Returns:
        The cuts. A part can come out empty when many rows share a timestamp.

    Raises:
        InputError: Ratios, fraction or window outside their range.
    """
    if len(ratios) != 3 or not all(0 < ratio < 1 for ratio in ratios) or not math.isclose(sum(ratios), 1, abs_tol=1e-6):
        raise InputError(f"split={tuple(ratios)}: give three shares above 0 (train, validation, test) that add up to 1")
    check_warm_fraction(warm_fraction)
    begin, end = window_rows(table, window)
    times = table.timestamp[begin:end]
    train_end = cut_forward(times, len(times) * ratios[0])
    cuts = (
        cut_forward(times[:train_end], train_end * warm_fraction),
        train_end,
        cut_forward(times, len(times) * (ratios[0] + ratios[1])),
        len(times),
    )
    return TimeSplit(*(begin + cut for cut in cuts))


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


def cut_forward(times: FloatArray, position: float) -> int:
    """Finds the cut nearest to a position among sorted times, moved forward until it splits no timestamp."""
    row = round(position)
    return row if row == 0 else int(np.searchsorted(times, times[row - 1], side="right"))


def check_warm_fraction(warm_fraction: float) -> None:
    """Refuses what is not a share from 0 to 1.

    Raises:
        InputError: Naming the option.
    """
    if not 0 <= warm_fraction <= 1:
        raise InputError(f"warm_fraction={warm_fraction}: give a share of the train part from 0 to 1")
