"""Warm-start batches: stretches of users' interactions, every position trained on at once."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from minirec_pl.data.batches import Batch
from minirec_pl.data.sampler import ShardedSampler
from minirec_pl.data.samples import NO_ITEM, IntArray, SampleTable
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
            raise InputError("The warm-start part has no interaction with a history before it; raise warm_fraction.")
        borders = np.flatnonzero(np.diff(table.user[self.rows])) + 1
        self.begins = [0, *borders.tolist()]
        self.ends = [*borders.tolist(), len(self.rows)]
        self.n_chunks = sum(
            _count_chunks(end - begin - 1, window) for begin, end in zip(self.begins, self.ends, strict=True)
        )
        super().__init__(range(self.n_chunks), seed=seed, num_replicas=num_replicas, rank=rank)

    def order(self) -> Sequence[Chunk]:
        """All chunks of the epoch in random order."""
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
        """Number of chunks, the same in every epoch."""
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
        """The batch of these chunks, in this order.

        Raises:
            InputError: An index is not a chunk of WarmChunkSampler.
        """
        if not all(isinstance(chunk, tuple) for chunk in chunks):
            raise InputError("Warm-start batches need their own sampler; use limit_train_batches, not overfit_batches.")
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
