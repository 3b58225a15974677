"""Shows what the policy recommends while it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from minirec_pl.reporting.completions import Row, completion_rows, print_completions
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.files import write_atomically
from minirec_pl.utils.run_folder import run_folder
from minirec_pl.utils.versions import check_pytorch_lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

FILE = "completions.parquet"


class CompletionsTable(Callback):
    """Every n optimizer steps a table of a few prompts with their rollouts, rewards and advantages.

    It is printed, logged to W&B as `completions` (offline too) and kept in the run folder as `completions.parquet`. The
    latter two hold all rows so far: step, sample_id, prompt (the history), target, completion, each reward, their sum,
    advantage. A `RetrievalPolicy`'s completion is its reasoning, and `recommended` the item that it ranks first. With
    `rollouts: expected` or `supervised` there is nothing to show.

    Args:
        every_n_steps: optimizer steps from one table to the next; the first step is always shown.
        num_prompts: prompts in a table, each with all its rollouts.
        print_table: whether to print the tables, too.

    Raises:
        InputError: if a number is below 1.
    """

    def __init__(self, every_n_steps: int = 100, num_prompts: int = 2, print_table: bool = True) -> None:
        check_pytorch_lightning()
        super().__init__()
        check_whole(every_n_steps=every_n_steps, num_prompts=num_prompts)
        for name, value in (("every_n_steps", every_n_steps), ("num_prompts", num_prompts)):
            if value < 1:
                raise InputError(f"{name} is {value}: give at least 1")
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.print_table = print_table
        self._rows: list[Row] = []
        self._shown = 0
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses modules that make no rollouts."""
        self._folder = run_folder(trainer)
        if stage == "fit" and not isinstance(pl_module, GRPORecModule):
            raise InputError(
                f"CompletionsTable shows the rollouts of GRPORecModule and {type(pl_module).__name__} makes none: "
                "leave it out"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the rollouts of the step just taken, when it is time."""
        step = trainer.global_step
        due = step == 1 or step % self.every_n_steps == 0
        if not trainer.is_global_zero or step == self._shown or not due:
            return
        assert isinstance(pl_module, GRPORecModule)
        if pl_module.generation is None or not pl_module.generation.batches:
            return
        self._shown = step
        rollouts = pl_module.generation.at(pl_module.generation.position)
        made = completion_rows(rollouts, pl_module.item_ids, self.num_prompts, pl_module.policy.words)
        rows = [{"step": step, **row} for row in made]
        self._rows += rows
        if self.print_table and rows:
            print_completions(rows)
        self._log(trainer)
        if self._folder is not None:
            table = pd.DataFrame(self._rows)
            write_atomically(self._folder / FILE, lambda scratch: table.to_parquet(scratch, index=False))

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                # A table that was logged cannot grow, and a step would clash with the logger's own.
                table = wandb.Table(dataframe=pd.DataFrame(self._rows))
                logger.experiment.log({"completions": table, "trainer/global_step": trainer.global_step})

    def state_dict(self) -> dict[str, Any]:
        """All rows so far."""
        return {"rows": self._rows, "shown": self._shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the rows of a checkpoint."""
        self._rows, self._shown = list(state_dict["rows"]), int(state_dict["shown"])
