"""Resumes a run inside a batch, beyond what Lightning saves: random numbers, gradients, a due validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minirec_pl.data.foreign_loader import ForeignLoader
from minirec_pl.data.loader import ResumableLoader, in_hand
from minirec_pl.data.train_loader import validation_is_due
from minirec_pl.utils.ranks import gather_states, world
from minirec_pl.utils.seeds import random_state, restore_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

RUNNING_KEY = "minirec_pl.Running"


class Running:
    """Saves and restores random numbers, gradients of an accumulation and a due validation, wherever a run stops.

    The hooks of a module and of selection callbacks call the methods; where both do, the first call counts. A batch
    that a checkpoint interrupts is trained on again by the resumed run, with the random numbers and gradients from
    before it. For that, a copy of the gradients is held during the backward passes after the first of an
    optimizer step.

    Attributes:
        validation_left_out: whether the checkpoint was taken before a validation that the resumed run skips.
    """

    def __init__(self) -> None:
        self.validation_left_out = False
        self._saved: Mapping[str, Any] | None = None
        self._random: Mapping[str, Any] | None = None
        self._validated = self._begun = (-1, -1)
        self._before: Mapping[str, Any] = {}
        self._gradients: dict[str, Tensor] | None = None

    @property
    def random(self) -> Mapping[str, Any] | None:
        """Random numbers of the checkpoint that is about to be resumed; None without one."""
        return None if self._saved is None else self._saved["random"]

    def save(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the state of every rank, tensors and primitives, into a checkpoint that holds more than weights."""
        if "optimizer_states" in checkpoint and RUNNING_KEY not in checkpoint:
            state = self._state(trainer, module)
            checkpoint[RUNNING_KEY] = gather_states(state, trainer.strategy.root_device)

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what `save` put into a checkpoint until `start`."""
        self._saved = states[world()[1] % len(states)]

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restores what was saved; called when training starts.

        Lightning skips a validation that was to follow; the random numbers that its loaders would have drawn are
        skipped too.
        """
        saved, self._saved, self._begun = self._saved, None, (-1, -1)
        if saved is None:
            return
        restore_random_state(saved["random"])
        for name, parameter in module.named_parameters():
            if name in saved["gradients"]:
                parameter.grad = saved["gradients"][name].to(parameter.device)
        self.validation_left_out = saved["validation_follows"]
        if self.validation_left_out:
            _draw_seeds(saved.get("validation_seeds", _seeds(trainer.val_dataloaders)))
        loader = trainer.train_dataloader
        if isinstance(loader, ForeignLoader):
            loader.random_state = random_state()
            return
        seeds = saved.get("epoch_seeds", 0)
        _draw_seeds(seeds)
        if not seeds or isinstance(loader, ResumableLoader):  # which draws its seed only now
            self._random = random_state()

    def begin_batch(self, trainer: Trainer) -> None:
        """Gives the first batch of a resumed run its random numbers; called before every batch."""
        if self._begun == position(trainer):
            return
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None
        loader = trainer.train_dataloader
        self._before = loader.random_before if isinstance(loader, ForeignLoader) else random_state()
        self._begun, self._gradients = position(trainer), None

    def before_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Keeps the gradients of the batches before; called before the backward pass of a batch."""
        if self._gradients is None and trained(trainer) % trainer.accumulate_grad_batches:
            self._gradients = _gradients(module)

    def end_batch(self) -> None:
        """Drops the gradients kept; called when a batch has been trained on."""
        self._gradients = None

    def begin_validation(self, trainer: Trainer) -> None:
        """Notes that no validation follows any more, since Lightning resumes inside it; called when one starts."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = position(trainer)

    def _state(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        interrupted = in_hand(trainer.fit_loop.epoch_loop.batch_progress) > 0 and self._begun == position(trainer)
        inside = bool(trained(trainer) % trainer.accumulate_grad_batches) and not epoch_is_done(trainer)
        gradients = {}
        if inside or not module.automatic_optimization:
            held = self._gradients if interrupted else None
            gradients = _gradients(module) if held is None else held
        follows = (
            trained(trainer) == position(trainer)[1]
            and self._validated != position(trainer)
            and validation_is_due(trainer)
        )
        return {
            "random": self._before if interrupted else random_state(),
            "gradients": gradients,
            "validation_follows": follows,
            "validation_seeds": _seeds(trainer.val_dataloaders),
            "epoch_seeds": _seeds(trainer.train_dataloader) if epoch_is_done(trainer) else 0,
        }


def _gradients(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def _seeds(loaders: Any) -> int:
    """Counts the seeds that loaders draw from torch's global generator when they are next iterated over."""
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    drawing = [
        loader
        for loader in loaders
        if isinstance(loader, DataLoader)
        and not isinstance(loader, ForeignLoader)
        and loader.generator is None
        and loader._iterator is None  # workers that persist have drawn theirs
    ]
    return len(drawing)


def _draw_seeds(count: int) -> None:
    for _ in range(count):
        torch.empty((), dtype=torch.int64).random_()


def trained(trainer: Trainer) -> int:
    """Counts the batches of the epoch that have been trained on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready - in_hand(progress)


def epoch_is_done(trainer: Trainer) -> bool:
    """Tells whether the last batch of the epoch has been trained on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch and not in_hand(progress)


def position(trainer: Trainer) -> tuple[int, int]:
    """Returns the epoch and the number of the batch that a fit is at."""
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
