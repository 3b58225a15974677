"""A SASRec-style recommender on MovieLens-100K, written without our modules, with the callback.

    minirec fetch ml-100k --to data
    python examples/sasrec.py --data data/ml-100k/ml-100k.inter --budget 0.5

Prints HR@10 and NDCG@10 of each user's last item, ranked among all items, and the samples seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector

LENGTH = 50


class SASRec(LightningModule):
    """Self-attention over the last items; the hidden state of the last position scores all items."""

    def __init__(self, n_items: int, width: int = 48) -> None:
        super().__init__()
        self.item = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.position = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.2, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_items + 1, bias=False)
        nn.init.normal_(self.item.weight, std=0.05)
        self.head.weight = self.item.weight
        self.seen = 0

    def forward(self, history: Tensor) -> Tensor:
        """Logits [B, n_items + 1] of histories [B, LENGTH], padded with 0 on the left."""
        x = self.item(history) + self.position.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=self.device)
        return self.head(self.body(x, mask=mask, is_causal=True)[:, -1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of the next item."""
        self.seen += len(batch[0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def read(path: Path, per_user: int) -> tuple[TensorDataset, TensorDataset, int]:
    """Training samples, each user's last item as the test, and the number of items."""
    table = pd.read_csv(path, sep="\t").sort_values("timestamp:float", kind="stable")
    items = pd.factorize(table["item_id:token"])[0] + 1
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for _, rows in pd.Series(items).groupby(table["user_id:token"].to_numpy()):
        sequence = rows.tolist()
        for end in range(max(1, len(sequence) - per_user), len(sequence)):
            history = sequence[max(0, end - LENGTH) : end]
            sample = ([0] * (LENGTH - len(history)) + history, sequence[end])
            parts["test" if end == len(sequence) - 1 else "train"].append(sample)

    def dataset(samples: list[Any]) -> TensorDataset:
        return TensorDataset(torch.tensor([h for h, _ in samples]), torch.tensor([t for _, t in samples]))

    return dataset(parts["train"]), dataset(parts["test"]), int(items.max())


def main(args: list[str] | None = None) -> dict[str, float]:
    """Trains and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-100k/ml-100k.inter"))
    parser.add_argument("--budget", type=float, default=0.5, help="part of the samples an epoch; 0 for no callback")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--per-user", type=int, default=30, help="last interactions of a user that become samples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    seed_everything(options.seed, verbose=False)
    train, test, n_items = read(options.data, options.per_user)
    module, callbacks = SASRec(n_items), []
    if options.budget:
        selector = MiniRecSelector(gate=(0.0, 0.95), mu=0.1)
        callbacks = [MiniRec(options.budget, warmup_epochs=1, selector=selector, probe=HeadProbe("head"))]
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="runs/sasrec",
    )
    trainer.fit(module, DataLoader(train, batch_size=128, shuffle=True))
    history, target = test.tensors
    with torch.no_grad():
        scores = torch.cat([module.eval()(part) for part in history.split(256)])
    scores.scatter_(1, history, -torch.inf)  # what a user has seen, and the padding
    rank = (scores > scores.gather(1, target[:, None])).sum(dim=1)
    hit = rank < 10
    result = {
        "hit_rate@10": float(hit.float().mean()),
        "ndcg@10": float((hit / (rank + 2).log2()).mean()),
        "samples_seen": float(module.seen),
    }
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
