"""Batches of samples: vectorised numpy from sample_ids to padded tensors."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from minirec_pl.data.samples import NO_ITEM, IntArray, SampleTable, gather_padded
from minirec_pl.utils.errors import InputError

Batch = dict[str, Tensor]
T = TypeVar("T", bound=np.generic)


def identity(batch: Any) -> Any:
    """Returns a batch as it is: the collation of a dataset that makes whole batches."""
    return batch


class SampleDataset(Dataset[Batch]):
    """Map-style dataset of samples, indexed by sample_id (never by a row position inside a part).

    ``dataset.__getitems__(sample_ids)`` is a whole batch, so a loader needs ``collate_fn=identity``:

    * ``sample_id`` [B] int64, ``user`` [B] int64 (user index), ``target`` [B] int64 (item index);
    * ``history`` [B, window] int64: last items of strictly earlier timestamps, most recent last, LEFT-padded with -1;
    * ``history_age`` [B, window] float32: seconds from each of them to the target, 0 where padded, NaN where
      ready-made sequences do not say;
    * ``history_rating`` [B, window] float32, where the table has ratings: NaN where padded or unknown;
    * ``seen`` [B, S] int64: all different items of strictly earlier timestamps, right-padded with -1.

    Args:
        table: All samples.
        window: Longest history, in items.
        allowed: The sample_ids that may be asked for, [n].
        part: What they are, for error messages.
        stride: A history that is longer than the window loses a multiple of so many items at its beginning, so that
            those of a user begin at the same item more often. The window is that of the longest history left.
    """

    def __init__(self, table: SampleTable, window: int, allowed: IntArray, part: str, stride: int = 1) -> None:
        self.table = table
        self.window = window
        self.stride = stride
        self.part = part
        self.allowed = np.zeros(len(table), dtype=bool)
        self.allowed[allowed] = True

    def __len__(self) -> int:
        return int(self.allowed.sum())

    def __getitem__(self, sample_id: int) -> Batch:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: Sequence[int] | IntArray) -> Batch:
        """Makes the batch of these samples, in this order.

        Raises:
            InputError: A sample_id is not one of those allowed.
        """
        table, ids = self.table, np.asarray(sample_ids, dtype=np.int64)
        known = (ids >= 0) & (ids < len(table))
        known[known] = self.allowed[ids[known]]
        if not known.all():
            raise InputError(
                f"sample_id {ids[~known][0]} is not in {self.part}: ask for its own sample_ids (for fewer "
                "batches use limit_train_batches, not overfit_batches)"
            )
        begin, end = table.history_begin[ids], table.history_end[ids]
        seen_of = table.seen_begin[ids], table.seen_end[ids]
        over = np.maximum(0, end - begin - self.window)
        begin = begin + -(-over // self.stride) * self.stride
        history = self._history(table.grouped_item, begin, end, NO_ITEM)
        age = table.timestamp[ids][:, None] - self._history(table.grouped_time, begin, end, np.nan)
        batch = {
            "sample_id": ids.copy(),
            "user": table.user[ids],
            "history": history,
            "history_age": np.where(history == NO_ITEM, 0, age).astype(np.float32),
            "target": table.item[ids],
            "seen": gather_padded(table.distinct_item, *seen_of, left=False),
        }
        if table.grouped_rating is not None:
            batch["history_rating"] = self._history(table.grouped_rating, begin, end, np.nan)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _history(self, values: npt.NDArray[T], begin: IntArray, end: IntArray, fill: float) -> npt.NDArray[T]:
        padded = np.full((len(begin), self.window), fill, dtype=values.dtype)
        recent = gather_padded(values, begin, end, left=True, fill=fill)
        padded[:, self.window - recent.shape[1] :] = recent
        return padded
