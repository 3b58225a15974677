"""What the callback itself costs an epoch, without the scoring forward passes, for a pool of 10,000 samples.

python benchmarks/callback_overhead.py --json overhead.json
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session import session_of


class Net(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """Seconds from the first batch of each epoch to the end of its last."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            self.epochs.append(time.perf_counter() - self.start)


def run(callback: MiniRec | None, n: int, epochs: int, width: int) -> dict[str, float]:
    """Seconds an epoch: of training, of the callback without scoring, of scoring, and of the whole fit."""
    torch.manual_seed(0)
    spent = 0.0
    clock = Clock()
    if callback is not None:
        for name in ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
                     "on_train_batch_end", "on_train_epoch_end"):  # fmt: skip

            def timed(*args: Any, hook: Any, **kwargs: Any) -> None:
                nonlocal spent
                start = time.perf_counter()
                hook(*args, **kwargs)
                spent += time.perf_counter() - start

            setattr(callback, name, partial(timed, hook=getattr(callback, name)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[*([] if callback is None else [callback]), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = TensorDataset(torch.randn(n, 128), torch.randint(10, (n,)))
        start = time.perf_counter()
        trainer.fit(Net(width), DataLoader(data, batch_size=64, shuffle=True))
        total = time.perf_counter() - start
        seconds = session_of(trainer).cost.seconds
        scoring, selection = seconds["scoring"], seconds["selection"]
    return {
        "training": median(clock.epochs),
        "callback": (spent - scoring) / epochs,
        "of_it_selector": selection / epochs,
        "scoring": scoring / epochs,
        "fit": total / epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048, help="hidden units of the trained network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("head")
    kinds = {
        "without": lambda: None,
        "budget 1.0 shuffled": lambda: MiniRec(1.0, selector=selector, probe=probe, curriculum="shuffled"),
        "budget 0.1": lambda: MiniRec(0.1, selector=selector, probe=probe),
    }
    result = {name: run(make(), options.pool, options.epochs, options.width) for name, make in kinds.items()}
    full = result["without"]["training"]
    for name, found in result.items():
        found["share_of_full_epoch"] = found["callback"] / full
        found["share_of_own_epoch"] = found["callback"] / found["training"]
        print(f"{name:20} " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    if options.json:
        options.json.write_text(json.dumps({"pool": options.pool, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
