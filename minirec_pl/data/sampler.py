"""Samplers that shard one common order over the ranks."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from minirec_pl.data.samples import IntArray
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.ranks import world

T = TypeVar("T")
Ragged = Literal["repeat", "drop", "keep"]


class ShardedSampler(DistributedSampler[T]):
    """Shards a common order: each rank takes the positions ``rank::num_replicas``.

    It is a DistributedSampler because Lightning leaves those alone; any other sampler that slices by rank would be
    sliced a second time.

    Args:
        entries: What is sampled; only its length is used here.
        seed: Seed of the order.
        num_replicas: Number of ranks; None: see :func:`world`.
        rank: The own rank; None: see :func:`world`.
        ragged: What to do when the order does not divide by the ranks: ``repeat`` its start, ``drop`` its end, or
            ``keep`` it (the ranks then differ in length by one, right for evaluation only).
    """

    def __init__(
        self, entries: Sized, *, seed: int, num_replicas: int | None, rank: int | None, ragged: Ragged = "repeat"
    ) -> None:
        default_replicas, default_rank = world()
        super().__init__(
            cast(Dataset[Any], entries),
            num_replicas=default_replicas if num_replicas is None else num_replicas,
            rank=default_rank if rank is None else rank,
            shuffle=False,
            seed=seed,
        )
        self.ragged = ragged

    @abstractmethod
    def order(self) -> Sequence[T]:
        """Returns the order of all ranks together in the current epoch."""

    @abstractmethod
    def order_length(self) -> int:
        """Returns the length of :meth:`order`."""

    @property
    def ragged_count(self) -> int:
        """Number of entries of the current order that are repeated (or dropped) to give every rank equally many."""
        rest = self.order_length() % self.num_replicas
        if rest == 0 or self.ragged == "keep":
            return 0
        return rest if self.ragged == "drop" else self.num_replicas - rest

    @property
    def repeats_its_last(self) -> bool:
        """Whether the own share ends with an entry that only gives every rank equally many."""
        return self.ragged == "repeat" and self.rank + (len(self) - 1) * self.num_replicas >= self.order_length()

    def __len__(self) -> int:
        n = self.order_length()
        if self.ragged == "drop":
            return n // self.num_replicas
        if self.ragged == "repeat":
            return -(-n // self.num_replicas)
        return len(range(self.rank, n, self.num_replicas))

    def __iter__(self) -> Iterator[T]:
        order = self.order()
        positions = (self.rank + step * self.num_replicas for step in range(len(self)))
        return iter([order[position % len(order)] for position in positions])


class OrderedSampler(ShardedSampler[int]):
    """Yields the given sample_ids in the given order, over the ranks without repeats: for evaluation and scoring.

    Args:
        sample_ids: [n] ids.
        num_replicas: Number of ranks; None: see :func:`world`.
        rank: The own rank; None: see :func:`world`.
    """

    def __init__(
        self, sample_ids: Sequence[int] | IntArray, *, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        self.sample_ids = [int(sample_id) for sample_id in sample_ids]
        super().__init__(self.sample_ids, seed=0, num_replicas=num_replicas, rank=rank, ragged="keep")

    def order(self) -> Sequence[int]:
        """Returns the given ids."""
        return self.sample_ids

    def order_length(self) -> int:
        """Returns the number of ids."""
        return len(self.sample_ids)


class CurriculumSampler(ShardedSampler[int]):
    """Yields sample_ids: by a plan when there is one, else all of them shuffled by (seed, epoch).

    It counts samples, not batches; batches are made by the loader.

    Args:
        sample_ids: The ids that may be trained on, [n], all different.
        seed: Seed of the shuffle.
        num_replicas: Number of ranks; None: that of torch.distributed when initialised, else 1.
        rank: The own rank; None: that of torch.distributed when initialised, else 0.
        ragged: A plan that does not divide by the ranks has its start repeated at its end (``repeat``) or its end
            dropped.
        together: Ids of one value here, [n] int64, follow each other where the first of them would come; None leaves
            the order alone.

    Raises:
        InputError: No ids.

    Example:
        >>> sampler = CurriculumSampler([4, 5, 6])
        >>> sampler.set_plan([6, 4])
        >>> list(sampler), len(sampler)
        ([6, 4], 2)
    """

    def __init__(
        self,
        sample_ids: Sequence[int] | IntArray,
        *,
        seed: int = 42,
        num_replicas: int | None = None,
        rank: int | None = None,
        ragged: Literal["repeat", "drop"] = "repeat",
        together: IntArray | None = None,
    ) -> None:
        self.sample_ids: IntArray = np.array(sample_ids, dtype=np.int64)
        self._together = (
            None if together is None else dict(zip(self.sample_ids.tolist(), together.tolist(), strict=True))
        )
        if len(self.sample_ids) == 0:
            raise InputError("there is no sample to train on: give at least one sample_id")
        self._plan: IntArray | None = None
        super().__init__(self.sample_ids, seed=seed, num_replicas=num_replicas, rank=rank, ragged=ragged)

    @property
    def plan(self) -> list[int] | None:
        """The plan in force, for all ranks together, or None."""
        return None if self._plan is None else cast(list[int], self._plan.tolist())

    def set_plan(self, ids: Sequence[int] | IntArray | None) -> None:
        """Uses exactly this order from the next ``iter`` on; None goes back to shuffling all ids.

        Args:
            ids: sample_ids in training order, for all ranks together; an id may come several times.

        Raises:
            InputError: The plan is empty or names a sample_id outside the pool.
        """
        if ids is None:
            self._plan = None
            return
        plan = np.array(ids, dtype=np.int64)
        if len(plan) == 0:
            raise InputError("the plan of the epoch is empty: select at least one sample")
        outside = plan[~np.isin(plan, self.sample_ids)]
        if len(outside):
            raise InputError(
                f"the plan names {len(outside)} sample_ids outside the pool, the first is {outside[0]}: plan only "
                "samples of the pool that this run trains on"
            )
        self._plan = plan

    def order(self) -> Sequence[int]:
        """Returns the plan, or all ids shuffled by (seed, epoch), those that belong together brought together."""
        order = self._plan
        if order is None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.sample_ids)
        if self._together is not None:
            group = [self._together[sample_id] for sample_id in order.tolist()]
            _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
            order = order[np.argsort(first[inverse], kind="stable")]
        return cast(list[int], order.tolist())

    def order_length(self) -> int:
        """Returns the length of the plan, or the number of ids."""
        return len(self.sample_ids if self._plan is None else self._plan)

    def state_dict(self) -> dict[str, Any]:
        """Returns ``{"seed": int, "epoch": int, "plan": [n] int64 tensor | None}``."""
        plan = None if self._plan is None else torch.from_numpy(self._plan.copy())
        return {"seed": self.seed, "epoch": self.epoch, "plan": plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores seed, epoch and plan.

        Raises:
            InputError: The plan does not fit the pool.
        """
        plan = state["plan"]
        self.set_plan(None if plan is None else plan.numpy())
        self.seed = int(state["seed"])
        self.set_epoch(int(state["epoch"]))
