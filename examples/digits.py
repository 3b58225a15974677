"""A plain Lightning classifier on scikit-learn's digits, with and without the callback.

    python examples/digits.py
    python examples/digits.py --budget 0.1 0.25 0.5 0.75 --seeds 5 --json digits.json

Prints test accuracy, seconds and samples seen for the full data, for MiniRec and for a random choice of the same size.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector, RandomSelector


class Digits(LightningModule):
    """Two layers; nothing in it knows of selection."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))
        self.classifier = nn.Linear(64, 10)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 64]."""
        return self.classifier(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        self.seen += len(batch[0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def run(callbacks: list[Callback], seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy, samples seen and seconds of one run."""
    seed_everything(seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=seed, stratify=labels)
    x, x_test, y, y_test = (
        torch.as_tensor(part).float() if part.ndim == 2 else torch.as_tensor(part) for part in parts
    )
    module, start = Digits(), time.perf_counter()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="runs/digits",
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = module.eval()(x_test).argmax(dim=1) == y_test
    return {"accuracy": float(right.float().mean()), "samples_seen": module.seen, "seconds": seconds}


def minirec(budget: float) -> list[Callback]:
    """The callback: after an epoch on everything a new choice every fourth epoch."""
    selector, probe = MiniRecSelector(gate=(0.0, 1.0)), HeadProbe("classifier", forward=0, target=1)
    options = {"warmup_epochs": 1, "every_n_epochs": 4, "rescore_fraction": 1.0, "curriculum": "shuffled"}
    return [MiniRec(budget, selector=selector, probe=probe, **options)]


def random(budget: float, seed: int) -> list[Callback]:
    """As many samples, drawn anew each epoch."""
    return [MiniRec(budget, warmup_epochs=1, selector=RandomSelector(seed, redraw=True), curriculum="shuffled")]


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison, prints it and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.5], help="parts of the samples seen in all")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each kind")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on newer PyTorch

    def average(kind: str, budget: float) -> dict[str, float]:
        rows = []
        for seed in range(options.seeds):
            callbacks = {"full": [], "minirec": minirec, "random": lambda b, s=seed: random(b, s)}[kind]
            rows.append(run(callbacks(share(budget)) if callable(callbacks) else callbacks, seed, options.epochs))
        found = {name: mean(row[name] for row in rows) for name in rows[0]}
        print(
            f"{kind:8} {budget:5.2f}  accuracy {found['accuracy']:.4f}  samples {found['samples_seen']:7.0f}  "
            f"{found['seconds']:.1f} s"
        )
        return found

    def share(budget: float) -> float:
        """Part of the pool an epoch, such that with the epoch on all of it `budget` of the samples is seen."""
        return max(0.01, (budget * options.epochs - 1) / (options.epochs - 1))

    full = average("full", 1.0)
    curve = {budget: {kind: average(kind, budget) for kind in ("minirec", "random")} for budget in options.budget}
    main_budget = 0.5 if 0.5 in curve else options.budget[0]
    result = {
        "full": full["accuracy"],
        **{kind: found["accuracy"] for kind, found in curve[main_budget].items()},
        "samples_seen": {"full": full["samples_seen"]}
        | {kind: found["samples_seen"] for kind, found in curve[main_budget].items()},
        "budget": main_budget,
        "seeds": options.seeds,
        "curve": {str(budget): kinds for budget, kinds in curve.items()},
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
