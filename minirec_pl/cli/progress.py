"""How far a run is, where the output is not a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_TRAINED, _VALIDATED = ("train/loss", "train/reward"), ("val/ndcg@10",)


def progress_lines(enable_progress_bar: bool | None) -> list[Callback]:
    """`EpochLines` where no option decides on the progress bar and the output is not a terminal, else nothing."""
    return [EpochLines()] if enable_progress_bar is None and not Console().is_terminal else []


class EpochLines(ProgressBar):
    """Prints a line per epoch: epoch, optimizer steps, loss, reward, NDCG@10 on validation, seconds of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._started = 0.0
        self._validated = False

    def disable(self) -> None:
        """Prints nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Prints again."""
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the epoch."""
        self._started, self._validated = time.monotonic(), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the figures on validation are of this epoch."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line."""
        if not self._enabled:
            return
        last = trainer.max_epochs
        epoch = f"{trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")
        shown = _TRAINED + _VALIDATED * self._validated
        metrics = trainer.callback_metrics
        figures = [f"{name} {float(metrics[name]):.4f}" for name in shown if name in metrics]
        seconds = f"{time.monotonic() - self._started:.0f} s"
        print("  ".join([f"epoch {epoch}", f"step {trainer.global_step}", *figures, seconds]), flush=True)
