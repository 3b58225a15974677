"""How our sampler comes into a run: the only place that touches what Lightning keeps private."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_REMEDY = (
    "give it one DataLoader over a map-style dataset with "
    "`sampler=CurriculumSampler(range(len(dataset)))`, and keep that "
    "sampler on the DataModule or module so that every train_dataloader() call uses the same one"
)


def request_train_loader(trainer: Trainer) -> tuple[DataLoader[Any], CurriculumSampler]:
    """The training loader of a run and its CurriculumSampler, before the Trainer has asked for them.

    Raises:
        InputError: if there is not exactly one DataLoader, or its sampler is not a CurriculumSampler.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    if not isinstance(loader, DataLoader):
        raise InputError(f"selection cannot reorder a training loader of type {type(loader).__name__}: {_REMEDY}")
    sampler = loader.sampler
    if not isinstance(sampler, CurriculumSampler):
        raise InputError(f"selection cannot reorder a DataLoader with a {type(sampler).__name__}: {_REMEDY}")
    return loader, sampler


def check_train_sampler(trainer: Trainer, sampler: CurriculumSampler) -> None:
    """Refuses a run whose training loader does not draw from `sampler`, so that no plan is silently ignored.

    Raises:
        InputError: if the Trainer's loader has another sampler.
    """
    loader = trainer.train_dataloader
    if getattr(loader, "sampler", None) is not sampler:
        raise InputError(f"the Trainer draws its batches from another sampler than the selection plans for: {_REMEDY}")


def discard_train_loader(trainer: Trainer) -> None:
    """Makes the Trainer ask for its training loader again, if it has done so before the first plan was known.

    A module that reads `trainer.estimated_stepping_batches` in `configure_optimizers` causes that; the iterator made
    then would silently ignore the plan.
    """
    if trainer.train_dataloader is not None:
        trainer.fit_loop._combined_loader = None


def reload_every_epoch(trainer: Trainer) -> None:
    """Makes the Trainer count the batches of each epoch anew, since plans differ in length."""
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
