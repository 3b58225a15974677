"""A small fit with every figure of the dashboard, logged to an offline W&B run and to CSV."""

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from minirec_pl import GRPORecModule, RecDataModule
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, SelectionDashboard
from minirec_pl.policy import GenerativePolicy
from minirec_pl.selection import MiniRecSelector

from .tiny_config import TINY
from .toy_data import random_rows, write_dataset

EPOCHS = 3


class Seen(Callback):
    """The sample_ids of each epoch, in the order of training, and the costs after it."""

    def __init__(self):
        self.ids, self.costs = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.ids.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids[-1] += batch["sample_id"].tolist()

    def on_train_epoch_end(self, trainer, pl_module):
        cost = pl_module.cost.state_dict()
        self.costs.append({name: dict(values) for name, values in cost.items()})


def run(folder, loggers, *callbacks, ckpt_path=None):
    """Fits a tiny policy on toy data; the pool has 77 samples, of which half is picked."""
    if not (folder / "data").exists():
        write_dataset(folder / "data", random_rows(n=1500, n_users=25, n_moments=600, n_items=80))
    data = RecDataModule(str(folder / "data"), "toy", warm_fraction=0.9, batch_size=8, seed=1)
    data.setup("fit")
    torch.manual_seed(0)
    np.random.seed(0)
    policy = GenerativePolicy(config=TINY)
    policy.bind(data.catalogue)
    module = GRPORecModule(policy, num_generations=4)
    selector = MiniRecSelector(difficulty="pass_at_group", on_short="fill")
    minirec = MiniRec(0.5, rescore_fraction=1.0, selector=selector, curriculum=EasyToHardCurriculum(n_folds=2))
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=loggers,
        callbacks=[*callbacks, minirec],
        default_root_dir=folder,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def logged_run(folder):
    """Runs it in the folder and returns what was seen."""
    import wandb

    seen = Seen()
    loggers = [CSVLogger(folder, name="", version="run"), WandbLogger(save_dir=folder, offline=True, project="test")]
    run(folder, loggers, SelectionDashboard(), seen)
    wandb.finish()
    return seen
