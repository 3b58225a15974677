"""A loader that can resume inside an epoch and yields batches as often as they are used."""

from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torch.utils.data.distributed import DistributedSampler

from minirec_pl.data.sampler import ShardedSampler
from minirec_pl.utils.errors import InputError

GENERATION = "generation"
REPEATED = "repeated"
GROUP_SIZE = "group_size"


class GenerationSchedule(NamedTuple):
    """How a training loader serves a module that makes rollouts for several batches at once.

    Attributes:
        steps: Batches that rollouts are made for together.
        iterations: How often each of them is trained on.
        oversample: Samples per batch, as a multiple of those that are trained on.
    """

    steps: int = 1
    iterations: int = 1
    oversample: float = 1.0


def in_hand(progress: Any) -> int:
    """Counts the batches, 0 or 1, taken from the loader and not trained on, by Lightning's batch progress."""
    return int(progress.current.ready - progress.current.processed)


def limited(n_batches: int, limit: int | float) -> int:
    """Counts the batches that Lightning's `limit_train_batches` leaves: an int is a number, a float a share."""
    return min(limit, n_batches) if isinstance(limit, int) else int(n_batches * limit)


def shut_down(iterator: Any) -> None:
    """Ends the workers of an iterator over a DataLoader and closes their pipes, whoever still holds the iterator.

    Without it they live as long as the traceback of an exception that went through the iterator.
    """
    if isinstance(iterator, Generator):
        iterator.close()
    elif isinstance(iterator, _Iteration):
        shut_down(iterator.iterator)
    elif isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
        if iterator._shutdown:  # not so while Python itself exits
            for worker in iterator._workers:
                worker.close()
            results: Any = iterator._worker_result_queue
            results._reader.close()
            results._writer.close()


class _Iteration(Iterator[Any]):
    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except BaseException:
            shut_down(self.iterator)
            raise

    def __del__(self) -> None:
        shut_down(self.iterator)


class SampleLoader(DataLoader[Any]):
    """A DataLoader for evaluation and scoring, whose workers end with each iteration over it, however that ends."""

    def __iter__(self) -> Any:
        return _Iteration(super().__iter__())


class _Skipping:
    """The (batch) sampler of a loader, without the entries that the loader wants skipped at the time of ``iter``."""

    def __init__(self, loader: "ResumableLoader") -> None:
        self.loader = loader
        self.entries: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.entries), self.loader._first_entry(), None)

    def __len__(self) -> int:
        return len(self.entries)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position inside an epoch is saved in Lightning checkpoints.

    ``load_state_dict`` makes the next ``iter`` skip the batches that were already consumed, once, without loading
    their data. A state taken after the last batch of an epoch means the start of the next. The sampler's epoch
    travels along, because Lightning builds the iterator of a resumed run before it calls ``set_epoch``.

    Workers start when the first batch is asked for, and end with the iteration, however it ends, unless they persist.

    With ``steps`` or ``iterations`` above 1, ``steps`` batches (what is left at the end of an epoch) are read ahead,
    and the round of them is yielded ``iterations`` times. Each is then a dictionary with the further key
    ``generation``: its ``position`` among the ``positions`` of the whole, and at position 0 the different ``batches``.

    A batch that was yielded but not trained on, as when a checkpoint is saved because of an error or a signal inside
    ``training_step``, does not count as consumed.

    A batch of single samples that ends with one repeated for the sake of the other ranks says so by the further
    column ``repeated``, [B] bool.

    Attributes:
        batches_per_epoch: How many batches an epoch consumes where that is less than ``len`` (``limit_train_batches``).
        progress: Lightning's progress over batches (``trainer.fit_loop.epoch_loop.batch_progress``); None if unknown.
        steps: Batches that are used together.
        iterations: How often each of them is used.
    """

    batches_per_epoch: int | None = None
    progress: Any = None
    steps = 1
    iterations = 1
    _yielded = 0
    _skip = 0
    _length = 0

    @property
    def _index_sampler(self) -> Any:
        return _Skipping(self)

    def _first_entry(self) -> int:
        return self._yielded // (self.steps * self.iterations) * self.steps

    def __len__(self) -> int:
        return super().__len__() * self.iterations

    def __iter__(self) -> Any:
        self._yielded, self._skip = self._skip, 0
        self._length = self.batches_per_epoch or len(self)
        return self._begin()

    def _begin(self) -> Iterator[Any]:
        iterator = super().__iter__()
        try:
            batches = self._marked(iterator, self._first_entry())
            yield from self._count(batches) if self.steps * self.iterations == 1 else self._generations(batches)
        finally:
            if not self.persistent_workers:
                shut_down(iterator)

    def _marked(self, iterator: Any, start: int) -> Iterator[Any]:
        last = super().__len__() - 1
        for place, batch in enumerate(iterator, start):
            ends = place == last and isinstance(self.sampler, ShardedSampler) and self.sampler.repeats_its_last
            if ends and isinstance(batch, dict) and "history" in batch:
                n_rows = len(batch["history"])
                yield {**batch, REPEATED: torch.arange(n_rows) == n_rows - 1}
            else:
                yield batch

    def _count(self, iterator: Any) -> Iterator[Any]:
        for batch in iterator:
            self._yielded += 1
            yield batch

    def _generations(self, iterator: Any) -> Iterator[Any]:
        position = self._yielded % (self.steps * self.iterations)
        while (left := self._length - self._yielded + position) > 0:
            batches = list(islice(iterator, min(self.steps, left)))
            if not batches:
                return
            positions = min(len(batches) * self.iterations, left)
            for place in range(position, positions):
                self._yielded += 1
                generation: dict[str, Any] = {"position": place, "positions": positions}
                if place == 0:
                    generation["batches"] = batches
                yield {**batches[place % len(batches)], GENERATION: generation}
            position = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position: ``batches`` consumed in ``epoch`` of the sampler, and how they were made."""
        batches, epoch = self._yielded, int(getattr(self.sampler, "epoch", 0))
        if self.progress is not None:
            batches = max(0, batches - in_hand(self.progress))
        if 0 < self._length <= batches:
            batches, epoch = 0, epoch + 1
        return {"batches": batches, "epoch": epoch, **self._made()}

    def _made(self) -> dict[str, int]:
        made = {"batch_size": self.batch_size or 1, "ranks": getattr(self.sampler, "num_replicas", 1)}
        if self.steps * self.iterations > 1:
            made |= {"steps_per_generation": self.steps, "num_iterations": self.iterations}
        return made

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skips the batches that ``state`` counts, in the next ``iter`` only.

        Raises:
            InputError: The state is from inside an epoch whose batches were made or used differently.
        """
        for name, now in {"steps_per_generation": 1, "num_iterations": 1, **self._made()}.items():
            before = state.get(name, 1)
            if state["batches"] and before != now:
                raise InputError(
                    f"{name}={now}, but the checkpoint was taken inside an epoch with {name}={before}: resume with "
                    "that, or from a checkpoint of an epoch's end"
                )
        self._skip = state["batches"]
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(state["epoch"])
