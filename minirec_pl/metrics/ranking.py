"""Full-ranking metrics of next-item recommendation.

`target_rank` and `top_items` turn scores over the whole catalogue into ranks and lists; `HitRate`, `NDCG`, `MRR`,
`SampleRanks` and `Coverage` gather them over batches and processes. Items are catalogue indices, ranks start at 1.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from minirec_pl.utils.errors import InputError


def target_rank(scores: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """Ranks each target among all items the user has not seen.

    The rank is 1 + #{j unseen, j != t: s_j > s_t, or s_j = s_t and j < t}, the place of t in a stable sort of -scores.
    A target that is itself in `seen` is ranked all the same.

    Args:
        scores: [B, n_items] floating point, higher is better.
        target: [B] int64 item index.
        seen: [B, S] int64 item indices left out of the ranking, padded with -1; repeats are harmless, S may be 0.

    Returns:
        [B] int64, from 1 to n_items.

    Raises:
        InputError: If a score is NaN, an index is outside the catalogue or the shapes do not fit.

    Example:
        >>> target_rank(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]), torch.tensor([[1, -1]]))
        tensor([1])
    """
    _check_scores(scores, seen)
    n_items = scores.shape[1]
    if target.shape != scores.shape[:1]:
        raise InputError(
            f"target has shape {tuple(target.shape)} but scores have {scores.shape[0]} rows: give one target per row"
        )
    _check_items("target", target, n_items, lowest=0)
    column = target.unsqueeze(1)
    target_score = scores.gather(1, column)
    ahead = scores > target_score
    ahead |= (scores == target_score) & (torch.arange(n_items, device=scores.device) < column)
    # A target is never ahead of itself, so padding can point at its column.
    ahead.scatter_(1, torch.where(seen < 0, column, seen), False)
    return ahead.sum(dim=1) + 1


def top_items(scores: Tensor, k: int, seen: Tensor) -> Tensor:
    """Lists the k best unseen items of each row, best first; equal scores by the smaller index.

    Args:
        scores: [B, n_items] floating point, higher is better; items at -inf are never recommended.
        k: Length of the list.
        seen: [B, S] int64 item indices to leave out, padded with -1.

    Returns:
        [B, k] int64 item indices, -1 where fewer than k items remain.

    Raises:
        InputError: If a score is NaN, an index is outside the catalogue, k is below 1 or the shapes do not fit.

    Example:
        >>> top_items(torch.tensor([[0.1, 0.9, 0.5]]), 2, torch.tensor([[1, -1]]))
        tensor([[2, 0]])
    """
    _check_k(k)
    _check_scores(scores, seen)
    n_rows, n_items = scores.shape
    blocked = torch.zeros(n_rows, n_items + 1, dtype=torch.bool, device=scores.device)
    blocked.scatter_(1, torch.where(seen < 0, n_items, seen), True)
    open_scores = scores.masked_fill(blocked[:, :n_items], -torch.inf)
    length = min(k, n_items)
    best = open_scores.topk(length, dim=1)
    index = best.indices.sort(dim=1).values
    order = open_scores.gather(1, index).sort(dim=1, descending=True, stable=True).indices
    index = index.gather(1, order)
    # topk picks any of several items that tie for the last place; such rows take a full stable sort.
    tied = (open_scores >= best.values[:, -1:]).sum(dim=1) > length
    if bool(tied.any()):
        index[tied] = open_scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :length]
    index = index.masked_fill(open_scores.gather(1, index) == -torch.inf, -1)
    return torch.nn.functional.pad(index, (0, k - length), value=-1)


class SampleRanks(Metric):
    """The rank of each sample, each sample_id once (its first rank), over batches and processes.

    Example:
        >>> metric = SampleRanks()
        >>> metric.update(rank=torch.tensor([3, 11, 1]), sample_id=torch.tensor([7, 2, 7]))
        >>> metric.compute()
        tensor([[ 2, 11],
                [ 7,  3]])
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    records: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("records", default=[], dist_reduce_fx="cat")
        self._open_records()

    def _open_records(self) -> None:
        # torchmetrics stands in a float tensor for an empty list when processes are joined; ids must stay int64.
        self.records.append(torch.empty(0, 2, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        """Forgets all samples."""
        super().reset()
        self._open_records()

    def update(self, rank: Tensor, sample_id: Tensor) -> None:
        """Adds samples.

        Args:
            rank: [B] int64, 1-based rank of each target, see `target_rank`.
            sample_id: [B] int64; a sample met again (DDP padding, a repeated batch) is dropped at `compute`.

        Raises:
            InputError: If the shapes differ or a rank is below 1.
        """
        if rank.ndim != 1 or rank.shape != sample_id.shape:
            raise InputError(
                f"rank {tuple(rank.shape)} and sample_id {tuple(sample_id.shape)} must be vectors of one length: "
                "give one rank per sample"
            )
        if rank.numel() and int(rank.min()) < 1:
            bad = sample_id[int(rank.argmin())]
            raise InputError(f"sample_id {int(bad)} has rank {int(rank.min())}: give ranks from 1")
        self.records.append(torch.stack([sample_id, rank], dim=1).to(self.device, torch.int64))

    def compute(self) -> Tensor:
        """Returns `sample_id` and rank of each sample, int64 [n, 2], by ascending sample_id.

        Raises:
            InputError: If there are no samples.
        """
        records = dim_zero_cat(self.records)
        if len(records) == 0:
            raise InputError(f"{type(self).__name__} has no samples: update it with at least one batch first")
        sample_id, order = records[:, 0].sort(stable=True)
        first = torch.ones_like(sample_id, dtype=torch.bool)
        first[1:] = sample_id[1:] != sample_id[:-1]
        return records[order[first]]


class _RankMetric(SampleRanks):
    """Mean of a gain over samples."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Returns the mean gain as a float32 scalar.

        Raises:
            InputError: If there are no samples.
        """
        return self._gain(super().compute()[:, 1].float()).mean()

    @abstractmethod
    def _gain(self, rank: Tensor) -> Tensor:
        """Gain of each rank."""


class HitRate(_RankMetric):
    """HR@k = mean 1[rank <= k].

    Args:
        k: Length of the list.

    Raises:
        InputError: If k is below 1.

    Example:
        >>> metric = HitRate(k=10)
        >>> metric.update(rank=torch.tensor([3, 11]), sample_id=torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _check_k(k)

    def _gain(self, rank: Tensor) -> Tensor:
        return (rank <= self.k).to(rank.dtype)


class NDCG(_RankMetric):
    """NDCG@k of one relevant item = mean 1[rank <= k] / log2(1 + rank).

    Args:
        k: Length of the list.

    Raises:
        InputError: If k is below 1.

    Example:
        >>> metric = NDCG(k=10)
        >>> metric.update(rank=torch.tensor([3, 11]), sample_id=torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500)
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _check_k(k)

    def _gain(self, rank: Tensor) -> Tensor:
        return (rank <= self.k) / torch.log2(1 + rank)


class MRR(_RankMetric):
    """Mean reciprocal rank over the full ranking = mean 1 / rank.

    Example:
        >>> metric = MRR()
        >>> metric.update(rank=torch.tensor([2, 1]), sample_id=torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    def _gain(self, rank: Tensor) -> Tensor:
        return 1 / rank


class Coverage(Metric):
    """Share of the catalogue that is in at least one list of k recommended items, over batches and processes.

    Args:
        k: Length of the list.
        n_items: Size of the catalogue.

    Raises:
        InputError: If k or n_items is below 1.

    Example:
        >>> metric = Coverage(k=2, n_items=4)
        >>> metric.update(torch.tensor([[0, 1], [1, -1]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    recommended: Tensor
    n_lists: Tensor

    def __init__(self, k: int, n_items: int) -> None:
        super().__init__()
        if n_items < 1:
            raise InputError(f"n_items is {n_items}: give at least 1, the size of the catalogue")
        self.k = _check_k(k)
        self.n_items = n_items
        self.add_state("recommended", default=torch.zeros(n_items, dtype=torch.int64), dist_reduce_fx="max")
        self.add_state("n_lists", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, top_items: Tensor) -> None:
        """Adds lists.

        Args:
            top_items: [B, >= k] int64 item indices, best first, -1 for no item; only the first k columns count.

        Raises:
            InputError: If there are fewer than k columns or an index is outside the catalogue.
        """
        if top_items.ndim != 2 or top_items.shape[1] < self.k:
            raise InputError(
                f"top_items has shape {tuple(top_items.shape)}: give at least {self.k} columns, [B, {self.k}]"
            )
        lists = top_items[:, : self.k]
        _check_items("top_items", lists, self.n_items, lowest=-1)
        self.recommended[lists[lists >= 0]] = 1
        self.n_lists += len(lists)

    def compute(self) -> Tensor:
        """Returns the covered share, from 0 to 1, as a float32 scalar.

        Raises:
            InputError: If there are no samples.
        """
        if int(self.n_lists) == 0:
            raise InputError("Coverage has no samples: update it with at least one batch first")
        return self.recommended.sum().float() / self.n_items


def _check_k(k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}: give at least 1, the length of the list")
    return k


def _check_scores(scores: Tensor, seen: Tensor) -> None:
    if scores.ndim != 2 or seen.ndim != 2 or len(scores) != len(seen):
        raise InputError(
            f"scores {tuple(scores.shape)} and seen {tuple(seen.shape)} must be [B, n_items] and [B, S]: "
            "give one row of each per sample"
        )
    nan = scores.isnan()
    if bool(nan.any()):
        row, item = nan.nonzero()[0].tolist()
        raise InputError(f"the score of item {item} in row {row} is NaN: check the policy's weights and learning rate")
    _check_items("seen", seen, scores.shape[1], lowest=-1)


def _check_items(name: str, items: Tensor, n_items: int, *, lowest: int) -> None:
    if items.numel() == 0:
        return
    low, high = (int(bound) for bound in items.aminmax())
    if low < lowest or high >= n_items:
        wrong = low if low < lowest else high
        raise InputError(
            f"{name} holds item {wrong}: give item indices of this catalogue, from {lowest} to {n_items - 1}"
        )
