"""How our sampler comes into a run: the only place that touches what Lightning keeps private."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from minirec_pl.data.foreign import ForeignLoader, rebuild
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class TrainLoader:
    """The training loader of a run: one around a CurriculumSampler as it is, any other rebuilt around ours.

    Made in `on_fit_start`. If the Trainer has asked for its loader before, as a module that reads
    `trainer.estimated_stepping_batches` in `configure_optimizers` makes it do, that one is used, and the iterator made
    then, which would silently ignore the first plan, is discarded.

    Attributes:
        loader: the loader.
        sampler: its sampler.

    Raises:
        InputError: if the loader cannot be rebuilt, see `minirec_pl.data.foreign.rebuild`.
    """

    loader: DataLoader[Any]
    sampler: CurriculumSampler

    def __init__(self, trainer: Trainer) -> None:
        self._source = trainer.fit_loop._data_source.instance
        self._asked = trainer.current_epoch
        self._length = -1
        loader = trainer.train_dataloader
        if loader is None or isinstance(getattr(loader, "sampler", None), CurriculumSampler):
            loader = trainer.fit_loop._data_source.dataloader()
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, CurriculumSampler):
            self.loader, self.sampler = loader, loader.sampler
        else:
            self._install(trainer, rebuild(loader, trainer.limit_train_batches))
        trainer.fit_loop._combined_loader = None

    def _install(self, trainer: Trainer, loader: ForeignLoader) -> None:
        self.loader, self.sampler = loader, loader.foreign_sampler
        trainer.fit_loop._data_source.instance = loader

    def renew(self, trainer: Trainer, epoch: int) -> None:
        """Called with every new plan: has the batches counted anew where their number changed.

        Lightning keeps the number that it read first; a shorter plan would silently skip validation, a longer one be
        cut. Also asks the user's own source again when `reload_dataloaders_every_n_epochs` says so.
        """
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if isinstance(self.loader, ForeignLoader) and every and epoch - self._asked >= every:
            source = trainer.fit_loop._data_source
            source.instance, self._asked = self._source, epoch
            self._install(
                trainer, rebuild(source.dataloader(), trainer.limit_train_batches, self.loader.foreign_sampler)
            )
            self._length = -1
        if self._length != len(self.sampler):
            trainer.fit_loop._combined_loader = None
        self._length = len(self.sampler)

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


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a fit validates after the present batch."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
