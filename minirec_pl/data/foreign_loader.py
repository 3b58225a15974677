"""Loaders that are not ours, rebuilt around our sampler without a change to what a batch is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from minirec_pl.data.loader import ResumableLoader, in_hand, limited, shut_down
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.data.samples import IntArray
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import random_state, restore_random_state

_KEPT = ("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn", "generator")
_KEPT_OF_WORKERS = ("multiprocessing_context", "prefetch_factor", "persistent_workers")


class ForeignSampler(CurriculumSampler):
    """Yields the rows of a user's dataset: by a plan of sample_ids when there is one, else in the user's own order.

    A sample_id is the row itself, or `dataset.sample_ids[row]` where the dataset has such an attribute.

    Args:
        dataset: map-style.
        own: the sampler of the user's loader; without a plan, and on one rank, its order is passed through.

    Attributes:
        drawn: sample_ids in the order drawn since the epoch began, for this rank.

    Raises:
        InputError: if `sample_ids` are not different integers, one per row.
    """

    def __init__(self, dataset: Any, own: RandomSampler | SequentialSampler | DistributedSampler[Any]) -> None:
        keys = getattr(dataset, "sample_ids", None)
        ids = np.arange(len(dataset)) if keys is None else np.asarray(keys)
        if ids.shape != (len(dataset),) or not np.issubdtype(ids.dtype, np.integer) or len(np.unique(ids)) != len(ids):
            raise InputError(
                f"{type(dataset).__name__}.sample_ids must hold {len(dataset)} different integers, one for each row of "
                "the dataset: give it such, or leave the attribute out"
            )
        self.drawn: list[int] = []
        self._by_id = np.argsort(ids)
        self._sorted_ids = ids[self._by_id]
        self.own = own
        super().__init__(ids, seed=own.seed if isinstance(own, DistributedSampler) else _lightning_seed())

    @property
    def _shuffled(self) -> bool:
        return self.own.shuffle if isinstance(self.own, DistributedSampler) else isinstance(self.own, RandomSampler)

    def rows(self, sample_ids: Sequence[int] | IntArray) -> list[int]:
        """Looks up the rows of the dataset that hold these sample_ids."""
        return cast(list[int], self._by_id[np.searchsorted(self._sorted_ids, sample_ids)].tolist())

    def order(self) -> Sequence[int]:
        """Returns the plan; else all ids, in the order that Lightning's own sampler would give the ranks together."""
        if self._plan is not None or not self._shuffled:
            return cast(list[int], (self.sample_ids if self._plan is None else self._plan).tolist())
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return cast(list[int], self.sample_ids[torch.randperm(len(self.sample_ids), generator=generator)].tolist())

    def __iter__(self) -> Iterator[int]:
        self.drawn = drawn = []
        if self._plan is None and self.num_replicas == 1 and not isinstance(self.own, DistributedSampler):
            sample_ids = self.sample_ids.tolist()
            for row in self.own:
                drawn.append(sample_ids[row])
                yield row
            return
        ids = list(super().__iter__())
        for sample_id, row in zip(ids, self.rows(ids), strict=True):
            drawn.append(sample_id)
            yield row


class ForeignLoader(ResumableLoader):
    """A user's DataLoader around a `ForeignSampler`; everything else is as the user set it.

    The order of an epoch and the workers' seeds are drawn when the first batch is asked for, as they would be without
    us. They come from torch's global generator or the loader's own: a checkpoint keeps where these stood at that
    moment, so that an epoch that is resumed draws the same once more. What workers draw for a sample (augmentations)
    depends on the samples before it, and inside a resumed epoch starts anew.

    Args:
        loader: the user's.
        sampler: over the same dataset.
        limit: Lightning's `limit_train_batches`.

    Attributes:
        given: the user's loader.
        foreign_sampler: the sampler.
        renewed: whether it replaces one that was reloaded; a checkpoint holds generators and workers of that one.
        random_state: what the global generators are put to before the next epoch is begun, once; None leaves them.
        random_before: where the global generators stood before the last batch was asked for.
    """

    def __init__(self, loader: DataLoader[Any], sampler: ForeignSampler, limit: int | float = 1.0) -> None:
        names = _KEPT + (_KEPT_OF_WORKERS if loader.num_workers else ())
        super().__init__(loader.dataset, sampler=sampler, **{name: getattr(loader, name) for name in names})
        self.pin_memory_device, self.in_order = loader.pin_memory_device, loader.in_order
        self.given, self.foreign_sampler, self.renewed = loader, sampler, False
        self.limit = limit
        own = (self.generator, getattr(sampler.own, "generator", None))
        self._own_generators = [g for i, g in enumerate(own) if g is not None and g not in own[:i]]
        self._start = self._generator_states()
        self._replay: list[Tensor] | None = None
        self._winder = _Winder((), 0)
        self._reused = self._reused_before = False
        self.random_state: Mapping[str, Any] | None = None
        self.random_before: Mapping[str, Any] = {}

    @property
    def batches_per_epoch(self) -> int:  # type: ignore[override]
        """Number of batches that an epoch consumes."""
        return limited(len(self), self.limit)

    @property
    def _index_sampler(self) -> Any:
        return _Rewound(self)

    def __iter__(self) -> Any:
        self._yielded, self._skip = self._skip, 0
        self._length = self.batches_per_epoch
        return self._begin()

    def _begin(self) -> Iterator[Any]:
        if self.random_state is not None:
            restore_random_state(self.random_state)
            self.random_state = None
        self.random_before = random_state()
        now = self._generator_states()
        self._start, self._replay = self._replay or now, None
        self._reused = self._reused_before or self._iterator is not None
        generator = self.generator
        if self._yielded:
            self._set_generators(self._start)
        if self._reused_before:  # persistent workers draw their seed once in a run, which has been done
            self.generator, self._reused_before = torch.Generator(), False
        iterator = DataLoader.__iter__(self)
        self.generator = generator
        if self._yielded:
            self._winder.wind()
            self._set_generators(now)
        try:
            for batch in self._count(iterator):
                yield batch
                self.random_before = random_state()
        finally:
            if not self.persistent_workers:
                shut_down(iterator)

    def _generator_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(generator.get_state() for generator in self._own_generators)]

    def _set_generators(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for generator, state in zip(self._own_generators, states[1:], strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as `ResumableLoader` does, and the generators' states now and at the epoch's start."""
        state = super().state_dict()
        own, reused = self._generator_states()[1:], self._reused
        if not state["batches"]:
            first_in_hand = self._yielded == 1 and self.progress is not None and in_hand(self.progress) > 0
            own, reused = (self._start[1:], reused) if first_in_hand else (own, self._iterator is not None)
        return {**state, "start": self._start, "own_generators": own, "workers_reused": reused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position as `ResumableLoader` does, and puts the loader's own generators where they stood."""
        super().load_state_dict(state)
        self.load_generators(state)

    def load_generators(self, state: dict[str, Any]) -> None:
        """Restores the part of the state that differs between ranks; changes no position."""
        if not self.renewed and len(state.get("own_generators", ())) == len(self._own_generators):
            self._set_generators([torch.get_rng_state(), *state["own_generators"]])
            self._replay = state["start"]
            self._reused_before = state["workers_reused"] and self.persistent_workers


class _Rewound:
    """The batch sampler of a loader; an iteration leaves out the batches consumed before."""

    def __init__(self, loader: ForeignLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        self._loader._winder = _Winder(self._loader.batch_sampler or (), self._loader._yielded)
        return self._loader._winder

    def __len__(self) -> int:
        return len(self._loader.batch_sampler)  # type: ignore[arg-type]


class _Winder(Iterator[Any]):
    def __init__(self, entries: Iterable[Any], skip: int) -> None:
        self._entries, self._skip = iter(entries), skip

    def wind(self) -> None:
        """Skips what is to be left out."""
        while self._skip:
            next(self._entries, None)
            self._skip -= 1

    def __next__(self) -> Any:
        self.wind()
        return next(self._entries)


def rebuild(loader: object, limit: int | float = 1.0, sampler: ForeignSampler | None = None) -> ForeignLoader:
    """Rebuilds a user's loader around our sampler.

    Args:
        loader: what the user gave to `fit` or returned from `train_dataloader`.
        limit: Lightning's `limit_train_batches`.
        sampler: to keep, when the loader is reloaded.

    Raises:
        InputError: if it is not one DataLoader that makes batches of single samples of a map-style dataset, or a
            reloaded one has other samples.
    """
    if not isinstance(loader, DataLoader):
        several = (
            "several training loaders" if isinstance(loader, dict | list | tuple) else f"a {type(loader).__name__}"
        )
        raise InputError(
            f"selection needs one DataLoader to train from and got {several}: join the datasets with "
            "torch.utils.data.ConcatDataset and give one DataLoader over it"
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise InputError(
            f"selection cannot pick samples of {type(loader.dataset).__name__}, which has no len() and no index: "
            "give a map-style dataset, for instance list(...) of it"
        )
    if loader.batch_size is None:
        what = "a batch_sampler of its own" if loader.batch_sampler is not None else "batch_size=None"
        raise InputError(
            f"selection picks single samples, but the training DataLoader has {what}: give it batch_size=... and let "
            "collate_fn make the batch"
        )
    own: Any = loader.sampler
    if type(own) not in (RandomSampler, SequentialSampler, DistributedSampler) or getattr(own, "replacement", False):
        raise InputError(
            f"selection decides which samples are drawn, but the training DataLoader has a {type(own).__name__} of its "
            "own: use shuffle=True or False, and torch.utils.data.Subset for a part of the dataset"
        )
    if type(own) is RandomSampler and own.num_samples != len(loader.dataset):
        raise InputError(
            f"the RandomSampler draws {own.num_samples} samples per epoch: leave num_samples out and set a budget"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise InputError(
            f"{type(loader).__name__} makes batches in its own way, which selection would bypass: use a plain "
            "DataLoader with a collate_fn"
        )
    new = ForeignSampler(loader.dataset, own)
    if sampler is None:
        return ForeignLoader(loader, new, limit)
    if not np.array_equal(new.sample_ids, sampler.sample_ids):
        raise InputError(
            f"the reloaded training dataset has other samples ({len(new.sample_ids)}, before "
            f"{len(sampler.sample_ids)}): selection needs the same sample_ids throughout a run"
        )
    sampler.own = own
    made = ForeignLoader(loader, sampler, limit)
    made.renewed = True
    return made


def _lightning_seed() -> int:
    """The seed that Lightning gives to the DistributedSampler it would put in."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
