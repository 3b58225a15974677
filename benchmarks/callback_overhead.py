"""What the callback itself costs an epoch, without the scoring forward passes, for a pool of 10,000 samples.

    python benchmarks/callback_overhead.py --json overhead.json

The seconds of training are those of a full epoch without the callback (the first batch's start to the last one's end,
median of the epochs); those of the callback all that its hooks take up to the end of the last epoch, less the passes
that score, by the number of epochs. What is done once a run is told apart: the hashes of the weights, and the files and
the picture at the end. The kinds of run take turns, so that a share is one of neighbours in time; each figure is the
median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session import session

EACH = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
        "on_train_epoch_end", "on_save_checkpoint")  # fmt: skip
ONCE = ("on_train_end", "on_fit_end")
HASHING = ("fingerprints_of", "weights_digest")


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


def run(callback: MiniRec | None, options: argparse.Namespace, logged: bool = False) -> dict[str, float]:
    """Seconds of one fit, by epoch: of training, of the callback without scoring, of scoring; and once a run."""
    torch.manual_seed(0)
    spent: dict[str, float] = defaultdict(float)
    clock = Clock()

    def timed(*args: Any, function: Any, name: str, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return found

    for name in (*EACH, *ONCE) if callback is not None else ():
        setattr(callback, name, partial(timed, function=getattr(callback, name), name=name))
    measure = partial(timed, function=session.measure, name="scoring")
    hashing = {name: partial(timed, function=getattr(session, name), name="hashing") for name in HASHING}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(session, "measure", measure),
        patch.multiple(session, **hashing),
    ):
        others: list[Callback] = [clock, ModelCheckpoint()] if logged else [clock]
        trainer = Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            callbacks=[*([] if callback is None else [callback]), *others],
            logger=CSVLogger(folder) if logged else False,
            enable_checkpointing=logged,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = TensorDataset(torch.randn(options.pool, 128), torch.randint(10, (options.pool,)))
        start = time.perf_counter()
        trainer.fit(Net(options.width), DataLoader(data, batch_size=64, shuffle=True))
        total = time.perf_counter() - start
        selecting = session.session_of(trainer).cost.seconds["selection"]
    return {
        "training": median(clock.epochs),
        "callback": (sum(spent[name] for name in EACH) - spent["scoring"] - spent["hashing"]) / options.epochs,
        "of_it_selector": selecting / options.epochs,
        "scoring": spent["scoring"] / options.epochs,
        "once_a_run": sum(spent[name] for name in ONCE) + spent["hashing"],
        "fit": total / options.epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048, help="hidden units of the trained network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("head")
    tenth = partial(MiniRec, 0.1, selector=selector, probe=probe)
    kinds = {
        "without": lambda: run(None, options),
        "budget 1.0 shuffled": lambda: run(MiniRec(1.0, selector=selector, curriculum="shuffled"), options),
        "budget 0.1": lambda: run(tenth(), options),
        "budget 0.1, logger and checkpoints": lambda: run(tenth(), options, logged=True),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        found = {name: make() for name, make in kinds.items()}
        for figures in found.values():
            figures["share_of_full_epoch"] = figures["callback"] / found["without"]["training"]
            figures["share_of_own_epoch"] = figures["callback"] / figures["training"]
        rounds.append(found)
    result = {name: {key: median(found[name][key] for found in rounds) for key in rounds[0][name]} for name in kinds}
    for name, figures in result.items():
        print(f"{name:34} " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    print(f"2 % of a full epoch holds from {result['budget 0.1']['callback'] / 0.02:.1f} s of training an epoch on")
    if options.json:
        options.json.write_text(
            json.dumps({"pool": options.pool, "width": options.width, "rounds": options.rounds, **result}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
