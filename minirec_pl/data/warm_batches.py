"""Warm-start batches: stretches of users' interactions or ready-made sequences, every position trained on at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from minirec_pl.data.batches import Batch
from minirec_pl.data.sampler import ShardedSampler
from minirec_pl.data.samples import NO_ITEM, IntArray, SampleTable, gather_padded
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.utils.errors import InputError

Chunk = tuple[int, ...]


class WarmChunkSampler(ShardedSampler[Chunk]):
    """Cuts each user's warm-start interactions into chunks and yields each chunk as the tuple of its sample_ids.

    A chunk has at most ``window + 1`` interactions of one user in time order; all but its first may be targets, and
    the last of one chunk is the first of the next, so each target is in exactly one chunk. Each epoch (seed, epoch)
    draws anew: the order of interactions that share user and timestamp, the length of each user's first chunk (hence
    every later border) and the order of the chunks. The number of chunks is the same in every epoch, as Lightning
    reads it once.

    Args:
        table: All samples.
        warm: The sample_ids of the warm part, or the one below which all are.
        window: Longest context, in items.
        seed: Seed of the draws.
        num_replicas: Number of ranks; None: that of torch.distributed when initialised, else 1.
        rank: The own rank; None: that of torch.distributed when initialised, else 0.

    Raises:
        InputError: No user has an eligible target in the warm part.
    """

    def __init__(
        self,
        table: SampleTable,
        warm: IntArray | int,
        window: int,
        *,
        seed: int = 42,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.table = table
        self.window = window
        is_warm = np.zeros(len(table), dtype=bool)
        is_warm[np.arange(warm) if isinstance(warm, int) else warm] = True
        rows = table.rows[is_warm[table.rows]]
        useful = np.zeros(len(table.user_ids), dtype=bool)
        useful[table.user[rows[table.eligible[rows]]]] = True
        self.rows: IntArray = rows[useful[table.user[rows]]]
        if len(self.rows) == 0:
            raise InputError("the warm part has no interaction with a history before it: raise warm_fraction")
        borders = np.flatnonzero(np.diff(table.user[self.rows])) + 1
        self.begins = [0, *borders.tolist()]
        self.ends = [*borders.tolist(), len(self.rows)]
        self.n_chunks = sum(
            _count_chunks(end - begin - 1, window) for begin, end in zip(self.begins, self.ends, strict=True)
        )
        super().__init__(range(self.n_chunks), seed=seed, num_replicas=num_replicas, rank=rank)

    def order(self) -> Sequence[Chunk]:
        """Returns all chunks of the epoch in random order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        table, rows = self.table, self.rows
        shuffled = rows[np.lexsort((rng.random(len(rows)), table.timestamp[rows], table.user[rows]))].tolist()
        chunks: list[Chunk] = []
        for begin, end in zip(self.begins, self.ends, strict=True):
            low, high = _first_lengths(end - begin - 1, self.window)
            stop = begin + int(rng.integers(low, high + 1))
            start = begin
            while start < end - 1:
                chunks.append(tuple(shuffled[start : stop + 1]))
                start, stop = stop, min(stop + self.window, end - 1)
        return [chunks[position] for position in rng.permutation(len(chunks))]

    def order_length(self) -> int:
        """Returns the number of chunks, the same in every epoch."""
        return self.n_chunks


def _count_chunks(n_targets: int, window: int) -> int:
    """Chunks that hold ``n_targets``: as few as possible, or one more where the borders could hardly move otherwise."""
    fewest = -(-n_targets // window)
    rest = n_targets - (fewest - 1) * window
    return fewest + 1 if fewest > 1 and rest > max(window // 2, 1) else fewest


def _first_lengths(n_targets: int, window: int) -> tuple[int, int]:
    """Shortest and longest number of targets in the first chunk that lead to exactly :func:`_count_chunks` chunks."""
    if n_targets <= window:
        return n_targets, n_targets
    outside_full_ones = n_targets - (_count_chunks(n_targets, window) - 2) * window
    return max(outside_full_ones - window, 1), min(outside_full_ones - 1, window)


class WarmDataset(Dataset[Batch]):
    """Turns chunks into warm-start batches; the chunks themselves are the indices, so it holds no state of an epoch.

    ``dataset.__getitems__(chunks)`` is a whole batch of B chunks with P targets among them:

    * ``sequence`` [B, T] int64: item indices in time order, RIGHT-padded with -1;
    * ``row``, ``position``, ``target``, ``sample_id`` [P] int64: the hidden state after ``sequence[row, position]``,
      the last item of a strictly earlier timestamp, predicts the item index ``target`` of sample ``sample_id``.

    A target with no strictly earlier item in its chunk, or whose item the user had before, gives no pair.

    Args:
        table: All samples.
        n_chunks: Chunks in an epoch.
    """

    def __init__(self, table: SampleTable, n_chunks: int) -> None:
        self.table = table
        self.n_chunks = n_chunks

    def __len__(self) -> int:
        return self.n_chunks

    def __getitem__(self, chunk: Chunk) -> Batch:
        return self.__getitems__([chunk])

    def __getitems__(self, chunks: Sequence[Chunk]) -> Batch:
        """Makes the batch of these chunks, in this order.

        Raises:
            InputError: An index is not a chunk of WarmChunkSampler.
        """
        if not all(isinstance(chunk, tuple) for chunk in chunks):
            raise InputError("warm-start batches need their own sampler: use limit_train_batches, not overfit_batches")
        table = self.table
        width = max(map(len, chunks))
        ids = np.full((len(chunks), width), NO_ITEM, dtype=np.int64)
        for chunk_ids, chunk in zip(ids, chunks, strict=True):
            chunk_ids[: len(chunk)] = chunk
        inside = ids != NO_ITEM
        time = np.where(inside, table.timestamp[ids], np.inf)
        new_moment = np.ones_like(inside)
        new_moment[:, 1:] = time[:, 1:] != time[:, :-1]
        last_earlier = np.maximum.accumulate(np.where(new_moment, np.arange(width), 0), axis=1) - 1
        row, place = np.nonzero(inside & (last_earlier >= 0) & ~table.repeated[ids])
        position = last_earlier[row, place]
        used = int(position.max(initial=0)) + 1
        sample_id = ids[row, place]
        return {
            "sequence": torch.from_numpy(np.where(inside, table.item[ids], NO_ITEM)[:, :used].copy()),
            "row": torch.from_numpy(row.astype(np.int64)),
            "position": torch.from_numpy(position.astype(np.int64)),
            "target": torch.from_numpy(table.item[sample_id]),
            "sample_id": torch.from_numpy(sample_id),
        }


class WarmSequenceDataset(Dataset[Batch]):
    """Turns sample_ids of ready-made sequences into warm-start batches, see :class:`WarmDataset`.

    The sequence of a sample is its history. Each of its items is predicted from those before it, and the sample's own
    target from all; but what a user did once is learnt once, though histories overlap: an item that follows another is
    left out where the same step of the same user is a target of the warm part, or stands in an earlier history. So is
    an item that the user had before. Pairs within a history carry the ``sample_id`` of the sample it belongs to.

    Args:
        table: All samples.
        window: Longest history, in items.
        sample_ids: Those of the warm part, eligible, [n].
    """

    def __init__(self, table: SequenceTable, window: int, sample_ids: IntArray) -> None:
        self.table, self.window = table, window
        histories = [table.history(int(sample_id), window).tolist() for sample_id in sample_ids]
        users, targets = table.user[sample_ids].tolist(), table.item[sample_ids].tolist()
        learnt = {(user, own[-1], target) for user, own, target in zip(users, histories, targets, strict=True)}
        self._positions: dict[int, list[int]] = {}
        for sample_id, user, own in zip(sample_ids.tolist(), users, histories, strict=True):
            positions = self._positions[sample_id] = [len(own) - 1]
            for position in range(len(own) - 1):
                step = (user, own[position], own[position + 1])
                if step not in learnt and own[position + 1] not in own[: position + 1]:
                    learnt.add(step)
                    positions.append(position)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, sample_id: int) -> Batch:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: Sequence[int] | IntArray) -> Batch:
        """Makes the batch of these samples, in this order."""
        table, ids = self.table, np.asarray(sample_ids, dtype=np.int64)
        end = table.history_end[ids]
        begin = np.maximum(table.history_begin[ids], end - self.window)
        sequence = gather_padded(table.grouped_item, begin, end, left=False)
        positions = [self._positions[sample_id] for sample_id in ids.tolist()]
        row = np.arange(len(ids)).repeat([len(own) for own in positions])
        position = np.array([place for own in positions for place in own], dtype=np.int64)
        following = np.concatenate([sequence[:, 1:], np.full((len(ids), 1), NO_ITEM)], axis=1)
        following[np.arange(len(ids)), end - begin - 1] = table.item[ids]
        batch = {
            "sequence": sequence,
            "row": row,
            "position": position,
            "target": following[row, position],
            "sample_id": ids[row],
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}
