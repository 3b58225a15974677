"""One cell of the experiment with known kinds: a warm start, and GRPO on a pool by one method, with its curve."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from known_kinds import KINDS, RULES, KnownKinds
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from minirec_pl import GRPORecModule, RecDataModule, WarmStartModule
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec
from minirec_pl.metrics.evaluation import FIGURES, ranking_figures
from minirec_pl.metrics.ranking import target_rank
from minirec_pl.policy import GenerativePolicy
from minirec_pl.selection import MiniRecSelector, RandomSelector
from minirec_pl.selection.session.session import session_of
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.modules import evaluation_mode

METHODS = ("minirec", "minirec 0.1", "random", "full")
RESCORED = {"minirec": 1.0, "minirec 0.1": 0.1}
HISTORY = 6
LONGEST = 400  # epochs, were the tokens never reached


@dataclass(frozen=True)
class Settings:
    """What all cells share.

    Args:
        n_pool: Samples in the pool.
        budget: Share of the pool that an epoch of random and MiniRec trains on.
        epochs: Of MiniRec; random and the full pool go on until their tokens reach those of MiniRec.
        batch_size: Samples a step.
        lr: Of AdamW in GRPO, constant, so that a curve can be read at any number of tokens.
        warm_lr: Of AdamW in the warm start, one pass.
        warm_batch_size: Samples a step of the warm start.
    """

    n_pool: int = 640
    budget: float = 0.1
    epochs: int = 6
    batch_size: int = 32
    lr: float = 2e-3
    warm_lr: float = 5e-3
    warm_batch_size: int = 128


def selector() -> MiniRecSelector:
    """As in configs/ml-100k/quickstart.yaml."""
    return MiniRecSelector(mode="paper", difficulty="pass_at_group", mu=0.3, gate=(0.02, 0.95))


def data_of(settings: Settings, source: KnownKinds, train_on: str = "pool") -> RecDataModule:
    """The samples of a source, set up."""
    data = RecDataModule(
        source=source,
        train_on=train_on,  # type: ignore[arg-type]
        split="given",
        warm_fraction=source.warm_fraction,
        history_window=HISTORY,
        batch_size=settings.batch_size if train_on == "pool" else settings.warm_batch_size,
        seed=source.seed,
    )
    data.setup("fit")
    return data


def warm_policy(settings: Settings, source: KnownKinds) -> GenerativePolicy:
    """The policy that all cells of a seed start from, whatever their pool."""
    seed_everything(source.seed, verbose=False)
    data = data_of(settings, source, "warm_samples")
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": HISTORY + 2,
        "tie_word_embeddings": True,
    }
    policy = GenerativePolicy(config=config)
    optimizer = partial(torch.optim.AdamW, lr=settings.warm_lr, weight_decay=0.01)
    fit(WarmStartModule(policy, optimizer=optimizer), data, 1, [])
    return policy


def fit(module: LightningModule, data: RecDataModule, epochs: int, callbacks: list[Callback]) -> None:
    """A fit that leaves no files."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        ).fit(module, datamodule=data)


def quality(policy: GenerativePolicy, data: RecDataModule, part: str = "test") -> dict[str, float]:
    """NDCG@10 and hit rate on the held-out samples of the rules, of all and by kind."""
    ids = data.test_ids if part == "test" else data.val_ids
    kinds = data.source.kinds[ids]  # type: ignore[attr-defined]
    with evaluation_mode(policy):
        batches = data.sample_loader(ids, len(ids))
        ranks = torch.cat([target_rank(policy.item_logps(b), b["target"], b["seen"]) for b in batches])
    figures = ranking_figures(ranks, ids)
    found = {name: float(figures[name]) for name in FIGURES}
    for kind in RULES:
        rows = kinds == kind
        found[f"ndcg@10 {kind}"] = float(ranking_figures(ranks[torch.from_numpy(rows)], ids[rows])["ndcg@10"])
    return found


def tokens_of(cost: Cost) -> int:
    """Forward and backward, of scoring and training."""
    both = (cost.tokens_forward, cost.tokens_backward)
    return sum(tokens[phase] for tokens in both for phase in ("scoring", "training"))


class Curve(Callback):
    """Quality over tokens, from before the first step, and how many samples of each kind an epoch trains on.

    Args:
        every: Epochs from one point to the next; 0.5 also takes one in the middle of an epoch.
        epochs: It goes on for at least so many.
        at_least: Tokens, likewise.
        part: What the quality is of.
    """

    def __init__(self, every: float, epochs: int, at_least: int, part: str) -> None:
        self.every, self.epochs, self.at_least, self.part = every, epochs, at_least, part
        self.points: list[dict[str, float]] = []
        self.picks: list[Counter[str]] = []
        self.first: dict[str, dict[str, float]] = {}

    def _note(self, trainer: Trainer, module: Any, epoch: float) -> None:
        found = quality(module.policy, trainer.datamodule, self.part)  # type: ignore[attr-defined]
        self.points.append({"epoch": epoch, "tokens": tokens_of(module.cost), **found})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every < 1 and 2 * (batch_idx + 1) == trainer.num_training_batches:
            self._note(trainer, pl_module, trainer.current_epoch + 0.5)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        enough = epoch >= self.epochs and tokens_of(pl_module.cost) >= self.at_least
        trainer.should_stop = trainer.should_stop or enough
        if enough or epoch % self.every == 0:
            self._note(trainer, pl_module, epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, session = trainer.datamodule, session_of(trainer)  # type: ignore[attr-defined]
        ids = data.pool_ids if session.selected is None else session.selected
        self.picks.append(Counter(data.source.kinds[ids].tolist()))
        if session.scored and session.ledger is not None and not self.first:
            table = session.ledger.table
            table = table.assign(kind=data.source.kinds[table["sample_id"]])
            for kind, rows in table.groupby("kind"):
                self.first[str(kind)] = {
                    "difficulty": float(rows["difficulty"].median()),
                    "too_hard": float((rows["reason"] == "too_hard").mean()),
                    "too_easy": float((rows["reason"] == "too_easy").mean()),
                    "redundant": float((rows["reason"] == "redundant").mean()),
                }


def cell(
    settings: Settings,
    source: KnownKinds,
    policy: GenerativePolicy,
    method: str,
    at_least: int = 0,
    part: str = "test",
) -> dict[str, Any]:
    """Trains a copy of the warm policy by one method.

    Args:
        settings: Of all cells.
        source: Pool and held-out parts.
        policy: The warm policy.
        method: One of `METHODS`.
        at_least: Tokens, scoring included, until which it goes on after the epochs of the settings.
        part: What the curve is of, `test` or `validation`.

    Returns:
        `points` of the curve, samples trained on by kind and epoch, `first` (what the first ledger says of each kind),
        tokens of scoring and of training, seconds.
    """
    started = time.perf_counter()
    seed_everything(source.seed, verbose=False)
    data = data_of(settings, source)
    module = GRPORecModule(
        copy.deepcopy(policy),
        num_generations=16,
        scoring_generations=0,
        optimizer=partial(torch.optim.AdamW, lr=settings.lr, weight_decay=0.0),
    )
    made = {
        "random": lambda: MiniRec(
            settings.budget, selector=RandomSelector(source.seed, redraw=True), curriculum="shuffled"
        ),
        "full": lambda: MiniRec(1.0, curriculum="shuffled"),
    }
    make = made.get(method) or partial(
        MiniRec,
        settings.budget,
        rescore_fraction=RESCORED[method],
        selector=selector(),
        curriculum=EasyToHardCurriculum(),
    )
    every = {"random": 3, "full": 0.5}.get(method, 1)
    curve = Curve(every, settings.epochs, at_least, part)
    fit(module, data, LONGEST if at_least else settings.epochs, [curve, make()])
    cost = module.cost
    return {
        "points": curve.points,
        "picks": [{kind: epoch[kind] for kind in KINDS} for epoch in curve.picks],
        "first": curve.first,
        "tokens": {p: cost.tokens_forward[p] + cost.tokens_backward[p] for p in ("scoring", "training")},
        "seconds": time.perf_counter() - started,
    }
