"""Projects that know nothing of this library: a dataset, a module, and a note of every batch `training_step` got."""

import hashlib
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

N, CLASSES = 60, 3


@dataclass
class Row:
    x: torch.Tensor
    y: torch.Tensor


def stack(rows):
    return Row(torch.stack([row.x for row in rows]), torch.stack([row.y for row in rows]))


class Points(Dataset):
    """Points in the plane of three noisy classes; the first coordinate of a point tells its row."""

    def __init__(self, kind="tuple", n=N, noise=False):
        generator = torch.Generator().manual_seed(5)
        self.kind, self.noise = kind, noise
        self.y = torch.randint(CLASSES, (n,), generator=generator)
        self.x = torch.randn(n, 4, generator=generator) + self.y[:, None]
        self.x[:, 0] = torch.arange(n) / 1000

    def __len__(self):
        return len(self.y)

    def __getitem__(self, row):
        x, y = self.x[row], self.y[row]
        if self.noise:
            x = x + torch.cat([torch.zeros(1), 0.1 * torch.randn(3)])
        if self.kind == "tuple":
            return x, y
        if self.kind == "tensor":
            return torch.cat([x, y[None].float()])
        if self.kind == "dict":
            return {"x": x, "y": y}
        return Row(x, y)


def x_and_y(batch):
    if isinstance(batch, Row):
        return batch.x, batch.y
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    if torch.is_tensor(batch):
        return batch[:, :4], batch[:, 4].long()
    return batch[0], batch[1]


class Classifier(LightningModule):
    """`seen` holds the rows of each epoch's batches, `batches` a digest of everything that was in them."""

    def __init__(self, dropout=0.0, loader=None, lr=0.1, **options):
        super().__init__()
        torch.manual_seed(11)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout))
        self.classifier = nn.Linear(8, CLASSES)
        self.lr, self.loader, self.options = lr, loader, options
        self.seen, self.batches, self.path, self.calls = {}, [], [], 0
        torch.manual_seed(12)

    def train_dataloader(self):
        self.calls += 1
        return self.loader()

    def forward(self, x):
        return self.classifier(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = x_and_y(batch)
        self.seen.setdefault(self.current_epoch, []).append((x[:, 0] * 1000).round().int().tolist())
        self.batches.append(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()[:8])
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = x_and_y(batch)
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.path.append(torch.cat([p.detach().flatten() for p in self.parameters()]).clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def rows(self, epoch):
        return [row for batch in self.seen[epoch] for row in batch]


class Data(LightningDataModule):
    def __init__(self, make):
        super().__init__()
        self.make, self.calls = make, 0

    def train_dataloader(self):
        self.calls += 1
        return self.make()


def loader_of(kind="tuple", n=N, noise=False, **options):
    if kind == "dataclass":
        options["collate_fn"] = stack
    return DataLoader(Points(kind, n, noise), **{"batch_size": 8, **options})
