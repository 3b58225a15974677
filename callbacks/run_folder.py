"""What a run leaves behind: results, the trained policy, and a checkpoint when it is interrupted."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from minirec_pl.files import write_atomically
from minirec_pl.recommender import RecModule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

INTERRUPTED = "interrupted.ckpt"


class RunFolder(Callback):
    """Writes `results.json` and `policy/` into the run folder, and a checkpoint on Ctrl-C.

    * `results.json`: after a fit the best validation figures and the cost, after a test the test figures.
    * `policy/`: after a fit the policy with the weights of the best checkpoint (the last ones if none is kept), as a
      Hugging Face folder.
    * `checkpoints/interrupted.ckpt`: where Ctrl-C stopped a fit, taken at the end of the running step; a second Ctrl-C
      stops at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_epoch = False
        self._stop = False
        self._samples: list[int] = []
        self._distinct: set[int] = set()
        self._previous_handler: Any = None

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """The folder of a run: where the first logger writes, else `default_root_dir`."""
        return Path(trainer.log_dir or trainer.default_root_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over Ctrl-C for the time of a fit."""
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._on_sigint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives Ctrl-C back."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if not self._in_epoch or self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting the samples of an epoch."""
        self._samples.append(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here to the end of the step Ctrl-C waits."""
        self._in_epoch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples; after Ctrl-C saves a checkpoint and stops."""
        ids = batch["sample_id"].tolist() if isinstance(batch, dict) and "sample_id" in batch else []
        if not self._samples:
            self._samples.append(0)
        self._samples[-1] += len(ids)
        self._distinct.update(ids)
        self._in_epoch = False
        if self._stop:
            trainer.save_checkpoint(self.folder(trainer) / "checkpoints" / INTERRUPTED)
            raise KeyboardInterrupt

    def state_dict(self) -> dict[str, Any]:
        """Counts for the checkpoint."""
        return {"samples": list(self._samples), "distinct": torch.tensor(sorted(self._distinct), dtype=torch.int64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts of the run so far."""
        self._samples = list(state_dict["samples"])
        self._distinct = set(state_dict["distinct"].tolist())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes results and policy."""
        if not trainer.is_global_zero or not isinstance(pl_module, RecModule):
            return
        checkpoint = trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        results: dict[str, Any] = {
            "stage": "fit",
            "best_checkpoint": best or None,
            "validation": _figures(trainer, "val/"),
            "epochs": len(self._samples),
            "samples_per_epoch": round(sum(self._samples) / max(1, len(self._samples))),
            "distinct_samples": len(self._distinct),
            **pl_module.cost.row(),
        }
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
            results["best"] = {str(checkpoint.monitor): float(checkpoint.best_model_score)}
        write_json(self.folder(trainer) / "results.json", results)
        self._export(trainer, pl_module, best)

    def _export(self, trainer: Trainer, module: RecModule, best: str) -> None:
        policy = module.policy
        last = {name: value.detach().clone() for name, value in policy.state_dict().items()}
        if best:
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            prefix = "policy."
            policy.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})
        try:
            policy.save_pretrained(self.folder(trainer) / "policy", module.cost.state_dict())
        finally:
            policy.load_state_dict(last)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the test figures."""
        if trainer.is_global_zero:
            write_json(self.folder(trainer) / "results.json", {"stage": "test", **_figures(trainer, "test/")})


def _figures(trainer: Trainer, prefix: str) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix(prefix): float(value) for name, value in metrics if name.startswith(prefix)}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, replacing the file whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
