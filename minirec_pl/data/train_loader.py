"""How our sampler comes into a run: the only place that touches what Lightning keeps private."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from minirec_pl.data.foreign_loader import ForeignLoader, rebuild
from minirec_pl.data.loader import limited, shut_down
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader

_TUNERS = {"LearningRateFinder", "BatchSizeFinder"}


class TrainLoader:
    """The training loader of a run: one around a CurriculumSampler as it is, any other rebuilt around ours.

    Made in `on_fit_start`. If the Trainer has asked for its loader before, as a module that reads
    `trainer.estimated_stepping_batches` in `configure_optimizers` makes it do, that one is used, and the iterator made
    then, which would silently ignore the first plan, is discarded.

    Attributes:
        loader: the loader.
        sampler: its sampler.

    Raises:
        InputError: if the loader cannot be rebuilt, see `minirec_pl.data.foreign_loader.rebuild`.
    """

    loader: DataLoader[Any]
    sampler: CurriculumSampler

    def __init__(self, trainer: Trainer) -> None:
        source = trainer.fit_loop._data_source
        vars(source).pop("dataloader", None)  # what `foresee` put there
        self._source = source.instance
        self._asked = trainer.current_epoch
        self._length = -1
        loader = trainer.train_dataloader
        self._discard(trainer)
        if not isinstance(loader, ForeignLoader) and (loader is None or _is_ours(loader)):
            loader = source.dataloader()
        if isinstance(loader, ForeignLoader):
            self._install(trainer, loader)
        elif _is_ours(loader):
            if getattr(loader._iterator, "_shutdown", False):  # a fit before this one was interrupted
                loader._iterator = None
            self.loader, self.sampler = loader, loader.sampler
        else:
            self._install(trainer, rebuild(loader, trainer.limit_train_batches))

    def _discard(self, trainer: Trainer) -> None:
        """Has Lightning ask for the loader anew; the workers of the one that it has end unless it is kept."""
        combined, trainer.fit_loop._combined_loader = trainer.fit_loop._combined_loader, None
        _end(combined)
        for loader in () if combined is None else combined.flattened:
            if isinstance(loader, DataLoader) and trainer.fit_loop._data_source.instance is not loader:
                shut_down(loader._iterator)
                loader._iterator = None

    def _install(self, trainer: Trainer, loader: ForeignLoader) -> None:
        self.loader, self.sampler = loader, loader.foreign_sampler
        loader.progress = trainer.fit_loop.epoch_loop.batch_progress
        trainer.fit_loop._data_source.instance = loader

    def renew(self, trainer: Trainer, epoch: int) -> None:
        """Called with every new plan: has the batches counted anew where their number changed.

        Lightning keeps the number that it read first; a shorter plan would silently skip validation, a longer one be
        cut. Also asks the user's own source again when `reload_dataloaders_every_n_epochs` says so. Workers of a loader
        that is replaced end; those that persist are kept where the source gives the loader that it gave before.

        Raises:
            InputError: if the plan is less than one batch and the loader drops it.
        """
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if isinstance(self.loader, ForeignLoader) and every and epoch != self._asked and epoch % every == 0:
            source, loader = trainer.fit_loop._data_source, self.loader
            source.instance, self._asked = self._source, epoch
            given = source.dataloader()
            if given is not loader.given or not loader.persistent_workers:
                self._discard(trainer)
                loader = rebuild(given, trainer.limit_train_batches, loader.foreign_sampler)
                self._length = -1
            self._install(trainer, loader)
        if self._length != len(self.sampler):
            self._discard(trainer)
            if not len(self.loader):
                raise InputError(
                    f"an epoch of {len(self.sampler)} samples is less than one batch of {self.loader.batch_size} and "
                    "the loader has drop_last=True: raise the budget, lower batch_size, or set drop_last to False"
                )
        self._length = len(self.sampler)

    def ask_again(self, trainer: Trainer) -> None:
        """Has the epoch that is about to begin draw from the plan of now, not of when Lightning set up its data."""
        self._discard(trainer)
        trainer.fit_loop.setup_data()

    def samples_in(self, n_batches: int) -> int:
        """Counts the different samples of the epoch in the first batches that the loader yields, on all ranks."""
        steps, iterations = getattr(self.loader, "steps", 1), getattr(self.loader, "iterations", 1)
        rounds, rest = divmod(n_batches, steps * iterations)
        different = rounds * steps + min(rest, steps)
        in_order = self.sampler.order_length() - (self.sampler.ragged_count if self.sampler.ragged == "drop" else 0)
        return min(different * (self.loader.batch_size or 1) * self.sampler.num_replicas, in_order)

    def dropped(self, trainer: Trainer) -> dict[str, int]:
        """Counts the samples of the plan that no batch of the epoch holds: `incomplete_batch` and `limit`."""
        n_batches = len(self.loader)
        batched = self.samples_in(n_batches)
        incomplete = self.samples_in(self.sampler.order_length() * getattr(self.loader, "iterations", 1)) - batched
        return {"incomplete_batch": incomplete, "limit": batched - self._reached(trainer)}

    def missed(self, trainer: Trainer, *, begun: bool) -> int:
        """Counts the samples that an epoch would still have trained on, had it not ended before its last batch.

        Args:
            trainer: that fits.
            begun: False for an epoch that was planned and never began.
        """
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = min(progress.started, progress.processed)  # a batch that on_train_batch_start stops at is not started
        return self._reached(trainer) - (self.samples_in(done) if begun else 0)

    def _reached(self, trainer: Trainer) -> int:
        return self.samples_in(limited(len(self.loader), trainer.limit_train_batches))

    def rows_of(self, batch_idx: int) -> int:
        """Counts the rows of a batch on this rank."""
        size = self.loader.batch_size or 1
        return max(0, min(size, len(self.sampler) - batch_idx * size))

    def check(self, trainer: Trainer) -> None:
        """Refuses a run that does not draw from our sampler, so that no plan is silently ignored.

        Raises:
            InputError: if the Trainer's loader has another sampler.
        """
        if getattr(trainer.train_dataloader, "sampler", None) is not self.sampler:
            raise InputError(
                "the Trainer draws its batches from another sampler than the selection plans for: keep one "
                "CurriculumSampler on the DataModule or module, so that every train_dataloader() call uses the same, "
                "or leave the sampler out"
            )


def foresee(trainer: Trainer, warmup_epochs: int, count: Callable[[int], int] | None) -> None:
    """Lets a module that asks for the number of batches before the first plan is made be told that of the plans.

    `trainer.estimated_stepping_batches`, read in `configure_optimizers`, is a number of batches times `max_epochs`. The
    loader it is counted on gets as many samples as makes that the steps of all epochs together, rounded up to a whole
    number per epoch. `TrainLoader` takes this back.

    Args:
        trainer: that fits, in `setup`. One that tunes or overfits is left alone.
        warmup_epochs: epochs on the whole pool.
        count: samples in each later epoch, of the size of the pool; None for the whole pool.
    """
    if trainer.overfit_batches or _tunes(trainer):  # type: ignore[attr-defined]
        return
    source = trainer.fit_loop._data_source
    ask = type(source).dataloader

    def dataloader() -> Any:
        loader: Any = ask(source)
        loader = loader if _is_ours(loader) else rebuild(loader, trainer.limit_train_batches)
        if count is not None:
            _cut_to(loader, trainer, warmup_epochs, count(len(loader.sampler.sample_ids)))
        return loader

    vars(source)["dataloader"] = dataloader


def _cut_to(loader: DataLoader[Any], trainer: Trainer, warmup_epochs: int, n_samples: int) -> None:
    sampler = loader.sampler
    assert isinstance(sampler, CurriculumSampler)
    pool, epochs = len(sampler.sample_ids), max(trainer.max_epochs or 1, 1)
    warm = min(warmup_epochs, epochs)

    def steps(n: int) -> int:
        sampler.set_plan(sampler.sample_ids[:n])
        return math.ceil(limited(len(loader), trainer.limit_train_batches) / trainer.accumulate_grad_batches)

    each = math.ceil((warm * steps(pool) + (epochs - warm) * steps(n_samples)) / epochs)
    steps(min(bisect_left(range(1, pool + 1), each, key=steps) + 1, pool))


def end_workers(trainer: Trainer) -> None:
    """Ends the workers of a fit that fails or is interrupted, also of loaders that its traceback still holds."""
    loop = trainer.fit_loop
    for fetcher in (loop._data_fetcher, loop.epoch_loop.val_loop._data_fetcher):
        combined = None if fetcher is None else fetcher._combined_loader
        _end(combined)
        for loader in () if combined is None else combined.flattened:
            shut_down(getattr(loader, "_iterator", None))


def _end(combined: CombinedLoader | None) -> None:
    """Ends the iterators of loaders, but no workers that persist."""
    for iterator in () if combined is None or combined._iterator is None else combined._iterator.iterators:
        if not getattr(iterator, "_persistent_workers", False):
            shut_down(iterator)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a fit validates after the present batch."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def keep_columns(trainer: Trainer) -> None:
    """Has batches of samples reach the module as the loader made them, whatever the precision.

    Half precision rounds what is a float in a batch: ages by up to minutes a day, and ratings. Batches of other kinds
    are converted as ever.
    """
    plugin: Any = trainer.precision_plugin
    convert = type(plugin).convert_input

    def convert_others(batch: Any) -> Any:
        ours = isinstance(batch, Mapping) and ("history" in batch or "sequence" in batch)
        return batch if ours else convert(plugin, batch)

    plugin.convert_input = convert_others


def prepared(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch as `training_step` gets it: in the run's precision, after the batch hooks, on the module's device."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return trainer.strategy.batch_to_device(batch)


def _is_ours(loader: object) -> bool:
    return isinstance(loader, DataLoader) and isinstance(loader.sampler, CurriculumSampler)


def _tunes(trainer: Trainer) -> bool:
    """Whether a search for a learning rate or batch size comes first, on the loader as the user made it."""
    return any(base.__name__ in _TUNERS for c in trainer.callbacks for base in type(c).__mro__)  # type: ignore[attr-defined]
