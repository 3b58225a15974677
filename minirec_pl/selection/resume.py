"""What a run is in the middle of, beyond what Lightning saves: random numbers, gradients, a due validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from minirec_pl.data.install import validation_is_due
from minirec_pl.data.loader import in_hand
from minirec_pl.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def running_state(trainer: Trainer, module: LightningModule, validated: tuple[int, int]) -> dict[str, Any]:
    """Random numbers, gradients inside an accumulation window, and whether a validation is to follow.

    Args:
        trainer: in a fit.
        module: that is trained.
        validated: see `position`, of the last validation.

    Returns:
        Tensors and primitives.
    """
    inside = bool(trained(trainer) % trainer.accumulate_grad_batches) and not epoch_is_done(trainer)
    gradients = {}
    if inside or not module.automatic_optimization:
        gradients = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    return {
        "random": random_state(),
        "gradients": gradients,
        "validation_follows": trained(trainer) == position(trainer)[1]
        and validated != position(trainer)
        and validation_is_due(trainer),
    }


def restore_running_state(state: Mapping[str, Any], trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Puts back what `running_state` found; called when training starts.

    Lightning does not make up for a validation that was to follow, but may draw random numbers on the way past it.

    Returns:
        Random numbers to start the next batch with: as saved, and those drawn from torch's global generator that the
        loaders of the validation would have drawn.
    """
    restore_random_state(state["random"])
    for name, parameter in module.named_parameters():
        if name in state["gradients"]:
            parameter.grad = state["gradients"][name].to(parameter.device)
    if state["validation_follows"]:
        loaders = trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if isinstance(loader, DataLoader) and loader.generator is None:
                torch.empty((), dtype=torch.int64).random_()
    return random_state()


def trained(trainer: Trainer) -> int:
    """How many batches of the epoch have been trained on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready - in_hand(progress)


def epoch_is_done(trainer: Trainer) -> bool:
    """Whether the last batch of the epoch has been trained on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch and not in_hand(progress)


def position(trainer: Trainer) -> tuple[int, int]:
    """Epoch and number of the batch that a fit is at."""
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
