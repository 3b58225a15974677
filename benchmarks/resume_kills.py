"""SIGKILL at random steps: does the resumed run end bit-equal to one that was never stopped?

    python benchmarks/resume_kills.py --rounds 50 --seed 0 --json resume_kills.json
    python benchmarks/resume_kills.py --rounds 50 --case plain

Each round draws a configuration and a step, trains it to the end in one process, kills another at that step, resumes
from the last checkpoint in a third, and compares weights, optimizer, random numbers, plan and signals bit for bit. The
case `plain` trains a policy without a selection, with several batches to an optimizer step; its checkpoints land inside
accumulations.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl import GRPORecModule, RecDataModule, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.policy import GenerativePolicy
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector, RandomSelector
from minirec_pl.selection.session.session import session_of

EPOCHS = 3
OPEN = MiniRecSelector(difficulty="mean", gate=(-1.0, 2.0))


class Classifier(LightningModule):
    """Dropout, momentum and a rate that falls every epoch: all of it must come back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class SaveAndKill(Callback):
    """Saves every so many batches or at every epoch's end; kills its own process at one batch."""

    def __init__(self, path: Path, every: int | None, kill_at: int | None, before: bool) -> None:
        self.path, self.every, self.kill_at, self.before = path, every, kill_at, before
        self.batches = 0

    def _kill(self, before: bool) -> None:
        if self.kill_at == self.batches and self.before == before:
            os.kill(os.getpid(), signal.SIGKILL)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)

    def on_after_backward(self, *_: Any) -> None:
        self._kill(before=True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        if self.every and self.batches % self.every == 0:
            self._save(trainer)
        self._kill(before=False)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self.every:
            self._save(trainer)


def draw(numbers: random.Random) -> dict[str, Any]:
    """One configuration."""
    grpo = numbers.random() < 0.25
    workers = numbers.choice([0, 2])
    return {
        "grpo": grpo,
        "workers": workers,
        "persistent": bool(workers) and not grpo and numbers.random() < 0.5,
        "shuffle": numbers.random() < 0.7,
        "generator": numbers.random() < 0.3,
        "accumulate": numbers.choice([1, 3]),
        "validation": numbers.choice([None, 1.0, 0.5]),
        "selection": numbers.choice(["minirec", "minirec", "random", "everything", "warmup"]),
        "limit": numbers.choice([1.0, 1.0, 4]),
        "save_every": numbers.choice([1, 1, 2, 3, None]),
        "before": numbers.random() < 0.3,
        "seed": numbers.randrange(1000),
    }


def draw_plain(numbers: random.Random) -> dict[str, Any]:
    """One configuration without a selection, with accumulation."""
    return {
        "grpo": True,
        "warm": numbers.random() < 0.4,
        "iterations": numbers.choice([1, 1, 2]),
        "workers": numbers.choice([0, 0, 2]),
        "accumulate": numbers.choice([2, 3]),
        "validation": numbers.choice([None, 1.0, 3]),
        "selection": "nothing",
        "limit": numbers.choice([1.0, 1.0, 4]),
        "save_every": numbers.choice([1, 1, 2, 3, None]),
        "before": numbers.random() < 0.5,
        "seed": numbers.randrange(1000),
    }


def policy_module(config: dict[str, Any]) -> LightningModule:
    """A small policy with dropout, and the stage it is in."""
    policy = GenerativePolicy(
        config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "attention_dropout": 0.2 if config["selection"] == "nothing" else 0.0,
        }
    )

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.02)

    if config.get("warm"):
        return WarmStartModule(policy, dropout=0.2, optimizer=optimizer)
    return GRPORecModule(
        policy,
        num_generations=4,
        scoring_generations=2,
        num_iterations=config.get("iterations", 1),
        optimizer=optimizer,
    )


def write_toy(folder: Path) -> None:
    """Some 200 samples for the policy."""
    numbers = random.Random(0)
    rows = [(numbers.randrange(25), numbers.randrange(80), 880_000_000 + numbers.randrange(600)) for _ in range(1500)]
    lines = [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        *(f"u{u}\ti{i}\t3\t{t}" for u, i, t in rows),
    ]
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "toy.inter").write_text("\n".join(lines) + "\n")


def callbacks(selection: str, grpo: bool) -> list[MiniRec]:
    """What chooses the samples, if anything does."""
    return [] if selection == "nothing" else [selecting(selection, grpo)]


def selecting(selection: str, grpo: bool) -> MiniRec:
    """What chooses the samples."""
    probe = None if grpo else HeadProbe("head")
    if selection == "random":
        return MiniRec(0.5, selector=RandomSelector(redraw=True), curriculum="shuffled")
    if selection == "everything":
        return MiniRec(1.0, selector=OPEN, curriculum="shuffled", probe=probe)
    return MiniRec(0.5, selector=OPEN, rescore_fraction=0.5, warmup_epochs=int(selection == "warmup"), probe=probe)


def train(
    config: dict[str, Any], folder: Path, data: Path, kill_at: int | None, resume: bool, out: Path | None
) -> None:
    """One process: trains, and leaves what it ended with in `out`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    checkpoint = folder / "last.ckpt"
    saver = SaveAndKill(checkpoint, config["save_every"], kill_at, config["before"])
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*callbacks(config["selection"], config["grpo"]), saver],
        accumulate_grad_batches=config["accumulate"],
        limit_train_batches=config["limit"],
        limit_val_batches=2 if config["validation"] else 0,
        val_check_interval=config["validation"] or 1.0,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ckpt_path = str(checkpoint) if resume and checkpoint.is_file() else None
    if config["grpo"]:
        module: LightningModule = policy_module(config)
        rec = RecDataModule(
            str(data),
            "toy",
            train_on="warm" if config.get("warm") else "pool",
            warm_fraction=0.5,
            batch_size=24,
            warm_batch_size=2,
            seed=1,
            num_workers=config["workers"],
        )
        trainer.fit(module, rec, ckpt_path=ckpt_path)
    else:
        module = Classifier()
        numbers = torch.Generator().manual_seed(7)
        y = torch.randint(3, (70,), generator=numbers)
        dataset = TensorDataset(torch.randn(70, 4, generator=numbers) + y[:, None], y)
        loader = DataLoader(
            dataset,
            batch_size=8,
            shuffle=config["shuffle"],
            num_workers=config["workers"],
            persistent_workers=config["persistent"],
            generator=torch.Generator().manual_seed(3) if config["generator"] else None,
        )
        trainer.fit(module, loader, DataLoader(dataset, batch_size=16), ckpt_path=ckpt_path)
    if out is not None:
        state = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        if config["selection"] == "nothing":
            state["random"] = torch.get_rng_state()
        else:
            session = session_of(trainer)
            state |= {"plan": session.plan, "signals": session.store.digest()}
        torch.save({**state, "steps": saver.batches}, out)


def equal(first: Any, second: Any) -> bool:
    """Bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def one_round(number: int, numbers: random.Random, folder: Path, case: str) -> bool:
    """Whether the killed and resumed run equals the one that was let be."""
    config = draw(numbers) if case == "selection" else draw_plain(numbers)
    data, whole, resumed = folder.parent / "data", folder / "whole.pt", folder / "resumed.pt"
    folder.mkdir()

    def process(kill_at: int | None, resume: bool, out: Path | None, name: str) -> int | None:
        child = multiprocessing.get_context("fork").Process(
            target=train, args=(config, folder / name, data, kill_at, resume, out)
        )
        (folder / name).mkdir(exist_ok=True)
        child.start()
        child.join()
        return child.exitcode

    if process(None, False, whole, "a") != 0:
        raise SystemExit(f"round {number}: the run that is let be failed: {config}")
    expected = torch.load(whole, weights_only=True)
    steps = expected.pop("steps")
    per_epoch = steps // EPOCHS
    first = per_epoch if config["save_every"] is None else config["save_every"]
    kill_at = numbers.randrange(first, steps)
    if numbers.random() < 0.3:
        kill_at = per_epoch * numbers.randrange(1, EPOCHS)
    kill_at = max(kill_at, first)
    if process(kill_at, False, None, "b") != -signal.SIGKILL:
        raise SystemExit(f"round {number}: the process was to be killed at step {kill_at} and was not: {config}")
    code = process(None, True, resumed, "b")
    same = False
    if code == 0:
        found = torch.load(resumed, weights_only=True)
        same = all(equal(expected[name], found[name]) for name in expected)
    print(f"{number:3} {'equal' if same else 'DIFFERENT'} step {kill_at} of {steps} {json.dumps(config)}", flush=True)
    return same


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=["selection", "plain"], default="selection")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    numbers, start = random.Random(options.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder) / "data")
        count = sum(one_round(n, numbers, Path(folder) / f"round-{n}", options.case) for n in range(options.rounds))
    print(f"{count} of {options.rounds} equal, {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"rounds": options.rounds, "equal": count}, indent=2) + "\n")
    return int(count < options.rounds)


if __name__ == "__main__":
    sys.exit(main())
