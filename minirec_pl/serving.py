"""Whom and what `minirec predict` recommends: users of a history file, items of a list of candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minirec_pl.data.columns import Columns
from minirec_pl.data.samples import Catalogue, IntArray, SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources.tables import Table, as_id, ids_of, numbers_of, read_table, read_text, times_of, unique_ids
from minirec_pl.utils.errors import InputError


class Requests(NamedTuple):
    """What is asked for.

    Attributes:
        table: a sample for each request; its target means nothing where the request comes from a history file.
        sample_ids: int64 [n], in the order in which they are answered.
        dropped: what was left out and why, in words.
    """

    table: SampleTable
    sample_ids: IntArray
    dropped: list[str]


def read_history(path: Path, catalogue: Catalogue) -> Requests:
    """One request for each user of a file, who may be unknown to training: what comes after all of the history.

    The file, CSV or parquet, has a row per interaction (`user_id`, `item_id`, `timestamp`, perhaps `rating`, in any
    order) or a row per user (`user_id`, `history_item_id`: a list, oldest first; parquet only). Times ago are counted
    from the newest timestamp of the file.

    Items that are not in the catalogue are dropped and counted, and so are users who have no others.

    Args:
        path: of the file.
        catalogue: the items that the policy knows.

    Raises:
        InputError: if the file cannot be read, has neither kind of columns, or no user is left.
    """
    table = read_table(path)
    if Columns.HISTORY_ITEM_ID in table.frame:
        rows = _of_lists(table.select({}, (Columns.USER_ID, Columns.HISTORY_ITEM_ID)))
    else:
        rows = _of_log(table.select({}, (Columns.USER_ID, Columns.ITEM_ID, Columns.TIMESTAMP)))
    if not len(rows):
        raise InputError(f"{path} has no rows: give at least one user's history")
    known = rows.assign(item=pd.Index(catalogue.item_ids, dtype=object).get_indexer(pd.Index(rows["item"])))
    known = known[known["item"] >= 0]
    dropped = []
    if len(known) < len(rows):
        dropped.append(f"{len(rows) - len(known):,} of {len(rows):,} history items are not in the catalogue: dropped")
    users = known["user"].unique()
    n_users = rows["user"].nunique()
    if not len(users):
        example = rows["item"].iloc[0]
        raise InputError(
            f"{path}: no item of it is in the catalogue of {len(catalogue)}; ids are like {example!r} there and like "
            f"{catalogue.item_ids[0]!r} here, so mend the column item_id"
        )
    if len(users) < n_users:
        dropped.append(f"{n_users - len(users):,} of {n_users:,} users have no history item left: dropped")
    groups = [group for _, group in known.groupby("user", sort=False)]
    timed = not known["time"].isna().any()
    now = float(known["time"].max()) if timed else 0.0
    rated = not known["rating"].isna().all()
    requests = SequenceTable(
        [str(user) for user in users],
        np.zeros(len(users), dtype=np.int64),
        [group["item"].to_numpy(dtype=np.int64) for group in groups],
        len(catalogue),
        timestamps=np.full(len(users), now),
        history_times=[group["time"].to_numpy(dtype=np.float64) for group in groups] if timed else None,
        history_ratings=[group["rating"].to_numpy(dtype=np.float64) for group in groups] if rated else None,
    )
    return Requests(requests, np.arange(len(users), dtype=np.int64), dropped)


def _of_log(table: Table) -> pd.DataFrame:
    """Columns user, item, time and rating, users by first appearance, each user's rows by time."""
    rated = Columns.RATING in table.frame
    rows = pd.DataFrame(
        {
            "user": ids_of(table, Columns.USER_ID),
            "item": ids_of(table, Columns.ITEM_ID),
            "time": times_of(table, Columns.TIMESTAMP),
            "rating": numbers_of(table, Columns.RATING, required=False) if rated else np.nan,
        }
    )
    first = rows.groupby("user", sort=False).ngroup()
    return rows.iloc[np.lexsort((rows["time"], first))]


def _of_lists(table: Table) -> pd.DataFrame:
    users, lists = ids_of(table, Columns.USER_ID), table.frame[Columns.HISTORY_ITEM_ID].tolist()
    twice = [user for user, count in Counter(users).items() if count > 1]
    if twice:
        row = len(users) - 1 - users[::-1].index(twice[0])
        raise InputError(f"{table.where(row)}: the user {twice[0]!r} comes twice; give each user one row")
    for row, value in enumerate(lists):
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise InputError(
                f"{table.where(row)}, column {Columns.HISTORY_ITEM_ID}: {str(value)[:40]!r} is no list; write parquet, "
                "or a CSV with user_id, item_id and timestamp"
            )
    lengths = [len(items) for items in lists]
    flat: Sequence[Any] = [item for items in lists for item in items]
    return pd.DataFrame(
        {"user": np.repeat(np.array(users, dtype=object), lengths), "item": unique_ids(flat), "time": np.nan}
    ).assign(rating=np.nan)


def read_candidates(path: Path, catalogue: Catalogue) -> Tensor:
    """Which items may be recommended, bool [n_items].

    Args:
        path: parquet or CSV with a column `item_id`, or text with an id a line.
        catalogue: the items that the policy knows.

    Raises:
        InputError: if the file cannot be read, is empty, or names an item that is not in the catalogue, with its line.
    """
    if path.suffix == ".txt":
        if not path.is_file():
            raise InputError(f"{path} does not exist; give a file of item ids, one a line")
        lines = [(number, as_id(line)) for number, line in enumerate(read_text(path).splitlines(), start=1)]
        found = [(f"{path}, line {number}", item_id) for number, item_id in lines if item_id]
    else:
        table = read_table(path).select({}, (Columns.ITEM_ID,))
        found = [(table.where(row), item_id) for row, item_id in enumerate(ids_of(table, Columns.ITEM_ID))]
    if not found:
        raise InputError(f"{path} names no candidate: give at least one item id")
    mask = torch.zeros(len(catalogue), dtype=torch.bool)
    for where, item_id in found:
        if item_id not in catalogue:
            raise InputError(
                f"{where}: the item {item_id!r} is not in the catalogue of {len(catalogue)}; remove the line or add "
                "the item to the data"
            )
        mask[catalogue.index_of(item_id)] = True
    return mask
