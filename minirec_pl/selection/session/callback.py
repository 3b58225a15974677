"""The hooks that all selection callbacks share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch import Tensor

from minirec_pl.data.train_loader import end_workers
from minirec_pl.selection.selectors.protocol import Selector
from minirec_pl.selection.session.resume import RUNNING_KEY
from minirec_pl.selection.session.run_files import finish
from minirec_pl.selection.session.session import CHECKPOINT_KEY, session_of
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.versions import check_pytorch_lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SessionCallback(Callback):
    """Drives the `SelectionSession` of a Trainer; of several callbacks the first does the work.

    Attributes:
        selector: what the callback picks with, if it picks.
    """

    selector: Selector | None = None

    def __init__(self) -> None:
        check_pytorch_lightning()
        super().__init__()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the first epoch."""
        session_of(trainer).prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumes where the checkpoint was taken."""
        if session_of(trainer).ready:
            session_of(trainer).start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Gives the first batch of a resumed run the random numbers it would have had."""
        if session_of(trainer).ready:
            session_of(trainer).running.begin_batch(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps what a checkpoint taken during the backward pass needs."""
        if session_of(trainer).ready:
            session_of(trainer).running.before_backward(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the Trainer draws from the plan, and the plan is made with the weights that are trained."""
        if session_of(trainer).ready:
            session_of(trainer).check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the samples of a batch for which `training_step` returned no loss."""
        if session_of(trainer).ready and pl_module.automatic_optimization:
            session_of(trainer).end_batch(trainer, outputs, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the next epoch."""
        if session_of(trainer).ready:
            session_of(trainer).advance(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the samples of a plan that the run ended before."""
        if session_of(trainer).ready:
            session_of(trainer).end_training(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the validation after the current batch has begun."""
        session_of(trainer).running.begin_validation(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files of the last selection and removes unused ones."""
        finish(session_of(trainer), trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the files of the last selection of a fit that fails or is interrupted, and ends loaders' workers."""
        if trainer.state.fn == "fit":
            end_workers(trainer)
            with contextlib.suppress(InputError):
                finish(session_of(trainer), trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the session, once for all callbacks."""
        if CHECKPOINT_KEY not in checkpoint and session_of(trainer).ready:
            checkpoint[CHECKPOINT_KEY] = session_of(trainer).state_dict(trainer)
            session_of(trainer).running.save(trainer, pl_module, checkpoint)
            session_of(trainer).identity.save(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the session that a fit resumes."""
        if CHECKPOINT_KEY in checkpoint and trainer.state.fn == "fit" and not session_of(trainer).ready:
            session_of(trainer).identity.load(trainer, pl_module, checkpoint)
            session_of(trainer).restore(checkpoint[CHECKPOINT_KEY])
            ranks = checkpoint[CHECKPOINT_KEY]["ranks"]
            # Checkpoints of 0.1 kept the state of a rank inside the session.
            session_of(trainer).running.load(checkpoint.get(RUNNING_KEY) or [rank["running"] for rank in ranks])
