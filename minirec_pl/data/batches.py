"""Batches of samples: vectorised numpy from sample_ids to padded tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from minirec_pl.data.samples import NO_ITEM, IntArray, SampleTable
from minirec_pl.errors import InputError

Batch = dict[str, Tensor]


def identity(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch


def gather_padded(values: IntArray, begin: IntArray, end: IntArray, *, left: bool) -> IntArray:
    """Rows ``values[begin:end]`` as one array, padded with -1 on the left or on the right.

    Args:
        values: [M] values.
        begin: [B] first positions.
        end: [B] positions after the last.
        left: Pad on the left, else on the right.

    Returns:
        [B, max(end - begin)].
    """
    width = int((end - begin).max(initial=0))
    steps = np.arange(width)
    positions = (end[:, None] - width + steps) if left else (begin[:, None] + steps)
    inside = (positions >= begin[:, None]) & (positions < end[:, None])
    return np.where(inside, values[np.where(inside, positions, 0)], NO_ITEM)


class SampleDataset(Dataset[Batch]):
    """Map-style dataset of samples, indexed by sample_id (never by a row position inside a part).

    ``dataset.__getitems__(sample_ids)`` is a whole batch, so a loader needs ``collate_fn=identity``:

    * ``sample_id`` [B] int64, ``user`` [B] int64 (user index), ``target`` [B] int64 (item index);
    * ``history`` [B, window] int64: last items of strictly earlier timestamps, most recent last, LEFT-padded with -1;
    * ``seen`` [B, S] int64: all different items of strictly earlier timestamps, right-padded with -1.

    Args:
        table: All samples.
        window: Longest history, in items.
        allowed: The sample_ids that may be asked for, [n].
        part: What they are, for error messages.
    """

    def __init__(self, table: SampleTable, window: int, allowed: IntArray, part: str) -> None:
        self.table = table
        self.window = window
        self.part = part
        self.allowed = np.zeros(len(table), dtype=bool)
        self.allowed[allowed] = True

    def __len__(self) -> int:
        return int(self.allowed.sum())

    def __getitem__(self, sample_id: int) -> Batch:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: Sequence[int] | IntArray) -> Batch:
        """The batch of these samples, in this order.

        Raises:
            InputError: A sample_id is not one of those allowed.
        """
        table, ids = self.table, np.asarray(sample_ids, dtype=np.int64)
        known = (ids >= 0) & (ids < len(table))
        known[known] = self.allowed[ids[known]]
        if not known.all():
            raise InputError(
                f"sample_id {ids[~known][0]} is not in {self.part}; ask for its own sample_ids (for fewer "
                "batches use limit_train_batches, not overfit_batches)."
            )
        begin, end = table.history_begin[ids], table.history_end[ids]
        history = np.full((len(ids), self.window), NO_ITEM, dtype=np.int64)
        recent = gather_padded(table.grouped_item, np.maximum(begin, end - self.window), end, left=True)
        history[:, self.window - recent.shape[1] :] = recent
        seen = gather_padded(table.distinct_item, table.seen_begin[ids], table.seen_end[ids], left=False)
        return {
            "sample_id": torch.from_numpy(ids.copy()),
            "user": torch.from_numpy(table.user[ids]),
            "history": torch.from_numpy(history),
            "target": torch.from_numpy(table.item[ids]),
            "seen": torch.from_numpy(seen),
        }
