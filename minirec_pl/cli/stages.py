"""What `minirec fit` does around GRPO: the warm start before it, and tests of every stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor, nn

from minirec_pl.cli.terminal import console
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.splits import random_part
from minirec_pl.metrics.evaluation import FIGURES, K, Row, popularity_row, ranking_figures
from minirec_pl.selection.session.session import session_of
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.trainers.warm_start import WarmStartModule
from minirec_pl.utils.checkpoints import load_policy_weights, weights_under_adapters
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically, write_json
from minirec_pl.utils.ranks import gather_states
from minirec_pl.utils.run_folder import RESULTS, STAGES, WARM_START, WARM_STATE, is_first
from minirec_pl.utils.seeds import isolated_random_state, random_state, restore_random_state


@dataclass
class WarmStart:
    """The supervised stage before GRPO, on the part of train that the pool leaves out.

    Args:
        train_on: `warm` trains on whole sequences of the warm part, for ids of one token; `warm_samples` on single
            samples of it, which any policy can.
        samples: with `warm_samples`, how many, drawn at random by the seed of the data; None for the whole warm part.
        epochs: passes over the warm part, at most.
        batch_size: sequences or samples per batch.
        accumulate_grad_batches: batches per optimizer step.
        dropout: probability of dropping a value of the input embeddings and of the last hidden states, for ids of one
            token.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes a scheduler, stepped once per optimizer step; None keeps the rate constant.
        gradient_clip_val: largest norm of the gradient; None for no clipping.
        patience: epochs without a better NDCG@10 on validation after which to stop and keep the best; None keeps the
            last.
        reset_policy: the warm policy only scores and selects: GRPO then starts from the weights before the warm start,
            as the paper's proxy model has it. The selection must be made once.

    Raises:
        InputError: if a number is out of range.
    """

    train_on: Literal["warm", "warm_samples"] = "warm"
    samples: int | None = None
    epochs: int = 1
    batch_size: int = 16
    accumulate_grad_batches: int = 1
    dropout: float = 0.0
    optimizer: OptimizerCallable = torch.optim.AdamW
    lr_scheduler: LRSchedulerCallable | None = None
    gradient_clip_val: float | None = 1.0
    patience: int | None = None
    reset_policy: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "batch_size", "accumulate_grad_batches", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"warm_start.{name} is {value}: give a whole number of at least 1")
        if self.samples is not None and self.train_on == "warm":
            raise InputError("warm_start.samples counts single samples: set warm_start.train_on to warm_samples")

    def data(self, data: RecDataModule) -> RecDataModule:
        """Makes the same data, already read, train on the warm part.

        Raises:
            InputError: if it is empty.
        """
        rows = data.parts.warm[data.table.eligible[data.parts.warm]]
        if not len(rows):
            raise InputError("the warm part is empty: raise data.warm_fraction, or set warm_start to null")
        twin = copy.copy(data)
        twin.trainer = None
        vars(twin).pop("train_sampler", None)
        twin.train_on = self.train_on
        twin.warm_ids = random_part(rows, self.samples, data.seed)
        twin.batch_size = twin.warm_batch_size = self.batch_size
        return twin


class Stages:
    """The stages of one fit, tested on the same samples.

    What a killed run had done in its folder before its first checkpoint is not done again.

    Args:
        make_trainer: makes a Trainer on the devices of the fit, from options of its own.
        folder: of the run.
        model: what is trained.
        data: what it is trained on.
        tested: test each stage on the test part.
    """

    def __init__(
        self, make_trainer: Callable[..., Trainer], folder: Path, model: RecModule, data: RecDataModule, tested: bool
    ) -> None:
        self.make_trainer, self.folder, self.model, self.data, self.tested = make_trainer, folder, model, data, tested
        self.rows: list[Row] = []

    def prepare(self, options: WarmStart | None, fit: Trainer) -> None:
        """Checks what is asked for; reads the data and binds the policy, so that no stage has to.

        Args:
            options: of the warm start, if there is one.
            fit: the Trainer that GRPO will run in.

        Raises:
            InputError: if model or data are not those of this library, or `reset_policy` meets a selection that is made
                again.
        """
        if not isinstance(self.data, RecDataModule):
            raise InputError("warm_start and test_stages need a RecDataModule: set data to minirec_pl.RecDataModule")
        if options is not None and isinstance(self.model, WarmStartModule):
            raise InputError("the model is a WarmStartModule, a warm start already: set warm_start to null")
        if options is not None and options.reset_policy:
            check_selected_once(fit)
        self.data.prepare_data()
        self.data.keep_columns(getattr(self.model, "reward_arguments", ()))
        self.data.setup("fit")
        if isinstance(self.model, GRPORecModule):
            self.model.use_columns(self.data.own_columns)
        self.model.policy.bind(self.data.catalogue)
        self._read_rows(self.folder)

    def test(self, stage: str) -> None:
        """Tests the policy as it is, if tests are asked for; each result is written at once."""
        if not self.tested or any(row["stage"] == stage for row in self.rows):
            return
        ranker = RecModule(self.model.policy)
        trainer = self.make_trainer(logger=False, enable_checkpointing=False)
        with isolated_random_state():
            if not self.rows:
                self.rows.append(popularity_row(self.data))
            trainer.test(ranker, datamodule=self.data, verbose=False)
        ids, ranks = ranker.test_ranks.unbind(dim=1)
        figures = ranking_figures(ranks, self.data.table.user[ids.numpy()])
        self.rows.append({"stage": stage, **figures, **self.model.cost.row()})
        if trainer.is_global_zero:
            write_json(self.folder / STAGES, {"stages": self.rows})

    def warm_start(self, options: WarmStart, fit: Trainer) -> None:
        """Trains the policy on the warm part and keeps it in `warm_start/policy`.

        Weights, costs and random numbers at its end are kept until the fit ends, so that a run that is killed before
        its first checkpoint goes on from there.

        Args:
            options: of the warm start.
            fit: the Trainer that GRPO will run in, which a reset of the policy is entrusted to.
        """
        policy, folder = self.model.policy, self.folder / WARM_START
        if options.reset_policy:
            fit.callbacks.append(_StartWeights(policy))  # type: ignore[attr-defined]
        if (folder / WARM_STATE).is_file():
            self._take_warm_state(folder / WARM_STATE, fit.global_rank)
            return
        warm = WarmStartModule(policy, options.dropout, options.optimizer, options.lr_scheduler)
        warm.cost = self.model.cost
        best = ModelCheckpoint(folder, "best", monitor="val/ndcg@10", mode="max", save_weights_only=True)
        stop = EarlyStopping("val/ndcg@10", mode="max", patience=options.patience or 1)
        trainer = self.make_trainer(
            logger=CSVLogger(str(self.folder), name="", version=WARM_START),
            callbacks=[] if options.patience is None else [best, stop],
            enable_checkpointing=options.patience is not None,
            max_epochs=options.epochs,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=options.gradient_clip_val,
            num_sanity_val_steps=0,
            limit_val_batches=0 if options.patience is None else None,
        )
        trainer.fit(warm, datamodule=options.data(self.data))
        if best.best_model_path:
            load_policy_weights(policy, Path(best.best_model_path))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            Path(best.best_model_path or folder / "best.ckpt").unlink(missing_ok=True)
            policy.save_pretrained(folder / "policy", self.model.cost.state_dict())
        self._keep_warm_state(folder / WARM_STATE, trainer)

    def _keep_warm_state(self, path: Path, trainer: Trainer) -> None:
        policy, random = self.model.policy, gather_states(random_state(), trainer.strategy.root_device)
        fixed = weights_under_adapters(policy)
        weights = {name: value for name, value in policy.state_dict().items() if name not in fixed}
        state = {"policy": weights, "cost": self.model.cost.state_dict(), "random": random}
        if trainer.is_global_zero:
            write_atomically(path, lambda scratch: torch.save(state, scratch))
        trainer.strategy.barrier()

    def _take_warm_state(self, path: Path, rank: int) -> None:
        policy, state = self.model.policy, torch.load(path, map_location="cpu", weights_only=True)
        policy.load_state_dict({**weights_under_adapters(policy), **state["policy"]})
        self.model.cost.load_state_dict(state["cost"])
        restore_random_state(state["random"][rank % len(state["random"])])

    def take_over(self, checkpoint: Path) -> None:
        """Resumes the stages of the run that a checkpoint was taken in."""
        self._read_rows(checkpoint.parent.parent)
        if self.rows and is_first():
            write_json(self.folder / STAGES, {"stages": self.rows})

    def _read_rows(self, run: Path) -> None:
        for earlier in (run / STAGES, run / RESULTS):
            if self.tested and not self.rows and earlier.is_file():
                rows = json.loads(earlier.read_text(encoding="utf-8")).get("stages", [])
                self.rows = [row for row in rows if row["stage"] != "trained"]

    def finish(self) -> None:
        """Ends the stages: adds them to `results.json` and prints their table, and drops what a resume needs."""
        (self.folder / WARM_START / WARM_STATE).unlink(missing_ok=True)
        if not self.tested or not self.rows:
            return
        results = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        write_json(self.folder / RESULTS, {**results, "stages": self.rows})
        (self.folder / STAGES).unlink(missing_ok=True)
        console().print(stage_table(self.rows))
        print(f"results: {self.folder / 'results.json'}")


def stage_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Makes the terminal's table of a fit's stages: figures, standard errors by user, what was spent until then."""
    samples, users = rows[0]["samples"], rows[0]["users"]
    table = Table(title=f"Test part: {samples:,} samples of {users:,} users, the whole catalogue ranked")
    columns = ("stage", f"HR@{K}", f"NDCG@{K}", "rollouts scoring + training", "tokens forward + backward", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        rollouts, tokens = row["rollouts"], row["tokens"]
        table.add_row(
            row["stage"].replace("_", " "),
            *(f"{row[name]:.4f} ± {row[f'{name}_se_users']:.4f}" for name in FIGURES),
            f"{rollouts['scoring']:,} + {rollouts['training']:,}",
            f"{tokens['forward'] / 1e6:.2f} M + {tokens['backward'] / 1e6:.2f} M",
            f"{sum(row['seconds'].values()):.1f}",
        )
    return table


class _StartWeights(Callback):
    """Puts the trained weights back to where they were when this was made, as soon as the selection is made."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._weights = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes after the callbacks that score and select."""
        _put(pl_module.policy, self._weights)  # type: ignore[arg-type]
        reference = getattr(pl_module, "reference", None)
        if reference is not None:
            _put(reference, self._weights)
        session_of(trainer).keep_selection()


@torch.no_grad()
def _put(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def check_selected_once(trainer: Trainer) -> None:
    """Refuses `reset_policy` unless the selection is made before the first epoch and never again.

    Raises:
        InputError: naming the option that would have another selection made, by a policy that is not the proxy.
    """
    made: list[Any] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        made += [part for part in (callback, *getattr(callback, "parts", ())) if hasattr(part, "every_n_epochs")]
    selections = [part for part in made if hasattr(part, "warmup_epochs")]
    if not selections:
        raise InputError(
            "warm_start.reset_policy throws the warm policy away after it has selected, and nothing selects: set "
            "selection, or reset_policy to false"
        )
    (selection,) = selections
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
    if selection.warmup_epochs > 0 or selection.every_n_epochs < epochs:
        raise InputError(
            f"warm_start.reset_policy has the warm policy select, once: set selection.warmup_epochs to 0 (it is "
            f"{selection.warmup_epochs}) and selection.every_n_epochs to trainer.max_epochs at least (they are "
            f"{selection.every_n_epochs} and {trainer.max_epochs})"
        )
