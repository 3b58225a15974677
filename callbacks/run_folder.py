"""What a run leaves behind: results, the trained policy, and a checkpoint when it is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from minirec_pl.metrics.evaluation import ranking_figures
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.checkpoints import policy_of
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically, write_json
from minirec_pl.utils.metrics_file import count_rows, go_on_after
from minirec_pl.utils.run_folder import CHECKPOINTS, EVALUATIONS, RESULTS, run_folder, write_config

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

INTERRUPTED = "interrupted.ckpt"
LOGGED_ROWS = "minirec_pl.LoggedRows"


class RunFolder(Callback):
    """Writes `results.json`, `evaluations.csv` and `policy/` into the run folder, and a checkpoint on Ctrl-C.

    * `results.json`: after a fit the last and the best validation figures and the cost, after a test the test
      figures. It is written last, and a fit that trains further removes it first.
    * `evaluations.csv`: after a fit a row per validation: epoch (from 1), step, what was spent until then (rollouts,
      tokens and seconds of all phases), the figures, and the standard errors of HR@10 and NDCG@10 by user.
    * `policy/`: after a fit the policy with the weights of the best checkpoint (the last ones if none is kept), as a
      Hugging Face folder.
    * `checkpoints/interrupted.ckpt`: where Ctrl-C stopped a fit, taken at the end of the running step, or of the
      validation after the last step of an epoch; a second Ctrl-C stops at once.

    Checkpoints also hold the counts and figures so far, so that a resumed run ends like one that was never stopped.

    Args:
        config: text for the `config.yaml` of a run that is resumed, written when it trains further.

    Attributes:
        begun: whether the training loop was reached.
    """

    def __init__(self, config: str | None = None) -> None:
        super().__init__()
        self.begun = False
        self._config = config
        self._training = False
        self._stop = False
        self._samples: dict[int, int] = {}
        self._validation: dict[str, float] = {}
        self._evaluations: list[dict[str, float]] = []
        self._distinct: set[int] = set()
        self._previous_handler: Any = None
        self._pid = 0
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over Ctrl-C for the time of a fit."""
        folder = run_folder(trainer)
        if folder is None:
            raise InputError("RunFolder has no folder to write to: give the Trainer a logger or a default_root_dir")
        self._folder = folder
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            trainer.callbacks.append(_AfterEpoch(self))  # type: ignore[attr-defined]
            self._pid = os.getpid()
            self._previous_handler = signal.signal(signal.SIGINT, self._on_sigint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives Ctrl-C back, and passes one on that came after the last step."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None
        if self._stop:
            self._stop = False
            raise KeyboardInterrupt

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked loader worker: the main process ends it
            return
        if not self._training or self._stop:
            self._stop = False
            raise KeyboardInterrupt
        self._stop = True
        os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what was dropped or fixed in the data."""
        report = getattr(getattr(trainer, "datamodule", None), "report", {})
        for what, count in report.items() if trainer.is_global_zero else ():
            if count:
                print(f"data: {what} {count:,}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C waits, and the results of an earlier end are no longer those of the run."""
        self._training = self.begun = True
        if trainer.is_global_zero:
            (self._folder / RESULTS).unlink(missing_ok=True)
            if self._config is not None:
                write_config(self._folder, self._config)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples; after Ctrl-C stops inside an epoch."""
        ids = batch["sample_id"].tolist() if isinstance(batch, dict) and "sample_id" in batch else []
        if isinstance(outputs, dict) and "trained" in outputs:
            ids = outputs["trained"].tolist()
        epoch = trainer.current_epoch
        self._samples[epoch] = self._samples.get(epoch, 0) + len(ids)
        self._distinct.update(ids)
        if self._stop and not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_and_stop(trainer)

    def stop_between_epochs(self, trainer: Trainer) -> None:
        """After Ctrl-C stops, if another epoch would follow."""
        last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        if self._stop and not last and not trainer.should_stop:
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._folder / CHECKPOINTS / INTERRUPTED)
        self._stop = False
        raise KeyboardInterrupt

    def state_dict(self) -> dict[str, Any]:
        """Counts and figures for the checkpoint."""
        return {
            "samples": dict(self._samples),
            "validation": dict(self._validation),
            "evaluations": [dict(row) for row in self._evaluations],
            "distinct": torch.tensor(sorted(self._distinct), dtype=torch.int64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts and figures of the run so far."""
        self._samples = dict(state_dict["samples"])
        self._validation = dict(state_dict["validation"])
        self._evaluations = list(state_dict.get("evaluations", ()))
        self._distinct = set(state_dict["distinct"].tolist())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has `metrics.csv` written, and keeps how many rows it has."""
        logger = self._csv_logger(trainer)
        if logger is not None:
            checkpoint[LOGGED_ROWS] = count_rows(logger)

    def _csv_logger(self, trainer: Trainer) -> CSVLogger | None:
        if not trainer.is_global_zero:
            return None
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        return next((logger for logger in loggers if Path(logger.log_dir) == self._folder), None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with `metrics.csv`, and with the best checkpoints of a run that is resumed in another folder.

        A run that EarlyStopping had stopped stays so.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        logger = self._csv_logger(trainer)
        if logger is not None:
            steps = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
            go_on_after(logger, checkpoint.get(LOGGED_ROWS, 0), steps)
        states = checkpoint.get("callbacks", {})
        for early in trainer.early_stopping_callbacks:
            if state := states.get(early.state_key):
                trainer.should_stop |= state["wait_count"] >= state["patience"] or state["stopped_epoch"] > 0
        for callback in trainer.checkpoint_callbacks:
            state = states.get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and state and state.get("dirpath"):
                _move_best(state, Path(str(trainer.ckpt_path)).parent, Path(callback.dirpath))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes results and policy."""
        if not trainer.is_global_zero or not isinstance(pl_module, RecModule):
            return
        checkpoint, best = trainer.checkpoint_callback, best_checkpoint(trainer)
        results: dict[str, Any] = {
            "stage": "fit",
            "best_checkpoint": None if best is None else str(best),
            "validation": self._validation,
            "epochs": len(self._samples),
            "samples_per_epoch": round(sum(self._samples.values()) / max(1, len(self._samples))),
            "distinct_samples": len(self._distinct),
            **pl_module.cost.row(),
        }
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
            results["best"] = {str(checkpoint.monitor): float(checkpoint.best_model_score)}
        with policy_of(pl_module.policy, best):
            pl_module.policy.save_pretrained(self._folder / "policy", pl_module.cost.state_dict())
        if self._evaluations:
            table = pd.DataFrame(self._evaluations)
            table["epoch"] += 1
            write_atomically(self._folder / EVALUATIONS, lambda scratch: table.to_csv(scratch, index=False))
        write_json(self._folder / RESULTS, results)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the figures and what they have cost; after `validate` writes them."""
        if trainer.sanity_checking:
            return
        self._validation = _figures(trainer, "val/") | _errors(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and isinstance(pl_module, RecModule):
            spent = {"epoch": trainer.current_epoch, "step": trainer.global_step, **pl_module.cost.totals()}
            self._evaluations.append({**spent, **self._validation})
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.VALIDATING:
            write_json(self._folder / RESULTS, {"stage": "validate", **self._validation})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the test figures, with their standard errors where the users are known."""
        if not trainer.is_global_zero:
            return
        figures: dict[str, Any] = _figures(trainer, "test/")
        table = getattr(getattr(trainer, "datamodule", None), "table", None)
        if table is not None and isinstance(pl_module, RecModule):
            ids, ranks = pl_module.test_ranks.unbind(dim=1)
            figures = {**ranking_figures(ranks, table.user[ids.numpy()]), **figures}
        write_json(self._folder / RESULTS, {"stage": "test", **figures})


class _AfterEpoch(Checkpoint):
    """Comes after every ModelCheckpoint and EarlyStopping, so that a checkpoint knows what they made of the epoch."""

    def __init__(self, run_folder: RunFolder) -> None:
        self._run_folder = run_folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_folder.stop_between_epochs(trainer)


def best_checkpoint(trainer: Trainer) -> Path | None:
    """The best checkpoint of a fit, or None where none is kept."""
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    return Path(best) if best else None


def _move_best(state: dict[str, Any], beside: Path, folder: Path) -> None:
    """Copies the checkpoints that a ModelCheckpoint's state names to `folder` and makes the state name the copies.

    Args:
        state: of the callback.
        beside: where they lie if their own folder was moved.
        folder: of the resumed run.
    """
    last = folder / (Path(state.get("last_model_path", "")).name or "last.ckpt")
    state["last_model_path"] = str(last) if last.is_file() else ""
    if state["dirpath"] == str(folder):
        return
    moved: dict[str, str] = {}
    for path in {*state.get("best_k_models", {}), state.get("best_model_path", "")} - {""}:
        source, target = Path(path), folder / Path(path).name
        source = source if source.is_file() else beside / source.name
        if source.is_file():
            moved[path] = str(target)
        if source.is_file() and source.parent.resolve() != folder.resolve():
            write_atomically(target, lambda scratch, source=source: shutil.copyfile(source, scratch))  # type: ignore[misc]
    if moved:
        state["dirpath"] = str(folder)
        state["best_k_models"] = {moved.get(path, path): score for path, score in state["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path"):
            state[name] = moved.get(state[name], state[name])


def _errors(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """The standard errors of the last validation, by user, where the users are known."""
    table = getattr(getattr(trainer, "datamodule", None), "table", None)
    if table is None or not isinstance(module, RecModule):
        return {}
    ids, ranks = module.val_ranks.unbind(dim=1)
    found = ranking_figures(ranks, table.user[ids.numpy()])
    return {name: value for name, value in found.items() if name.endswith("_se_users")}


def _figures(trainer: Trainer, prefix: str) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix(prefix): float(value) for name, value in metrics if name.startswith(prefix)}
