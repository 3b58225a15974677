"""Two processes on gloo that are stopped and resumed: bit for bit those that were not, each with its own numbers."""

import random

import numpy as np
import pytest
import torch
from helpers.foreign import Classifier, loader_of
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import InputError
from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import CHECKPOINT_KEY, session_of

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 3


class Noisy(Classifier):
    """Dropout, and a loss that depends on Python's and NumPy's random numbers."""

    def __init__(self):
        super().__init__(dropout=0.4)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (random.random() + np.random.random())


class Watch(Callback):
    """Gives each rank and run random numbers of its own, saves after some batch, and notes how it ended."""

    def __init__(self, folder, salt, save_at):
        self.folder, self.salt, self.save_at, self.met = folder, salt, save_at, 0

    def on_fit_start(self, trainer, pl_module):
        seed = 10 * self.salt + trainer.global_rank
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def on_train_batch_end(self, trainer, *_):
        self.met += 1
        if self.met == self.save_at:
            trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        if self.save_at == "epoch end" and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_end(self, trainer, pl_module):
        session = session_of(trainer)
        state = {"weights": pl_module.path[-1], "batches": pl_module.batches, "plan": session.plan}
        state |= {"digest": session.store.digest(), "next": [random.random(), float(np.random.random())]}
        torch.save({**state, "torch": torch.get_rng_state()}, self.folder / f"{self.salt}-{trainer.global_rank}.pt")


def fit(make_trainer, folder, salt, save_at=None, devices=2, accumulate=1, **loader):
    callback = MiniRec(
        30, selector=MiniRecSelector(gate=(-1.0, 2.0)), rescore_fraction=0.5, probe=HeadProbe("classifier")
    )
    trainer = make_trainer(
        callbacks=[callback, Watch(folder, salt, save_at)],
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )
    ckpt_path = None if save_at else folder / "saved.ckpt"
    noise = not loader.get("num_workers")  # what a worker draws starts anew inside a resumed epoch
    trainer.fit(Noisy(), loader_of(batch_size=4, noise=noise, **loader), ckpt_path=ckpt_path)
    return [torch.load(folder / f"{salt}-{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize(
    ("save_at", "options"),
    [
        (6, {"shuffle": True}),
        slow(6, {"accumulate": 3, "num_workers": 2, "shuffle": True}),
        (4, {"accumulate": 2}),
        slow(3, {"num_workers": 2, "persistent_workers": True}),
    ],
)
def test_each_rank_goes_on_with_its_own_random_numbers_and_gradients(make_trainer, tmp_path, save_at, options):
    whole = fit(make_trainer, tmp_path, 1, save_at, **options)
    resumed = fit(make_trainer, tmp_path, 2, **options)
    assert not torch.equal(whole[0]["torch"], whole[1]["torch"])
    for before, after in zip(whole, resumed, strict=True):
        assert after["batches"] == before["batches"][save_at:]
        assert torch.equal(after["weights"], before["weights"])
        assert torch.equal(after["torch"], before["torch"])
        assert (after["plan"], after["digest"], after["next"]) == (before["plan"], before["digest"], before["next"])
    ranks = torch.load(tmp_path / "saved.ckpt", weights_only=True)[CHECKPOINT_KEY]["ranks"]
    assert len(ranks) == 2


def test_inside_an_epoch_another_number_of_ranks_is_refused(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, 1, 6)
    with pytest.raises(InputError, match="ranks=1, but the checkpoint was taken inside an epoch with ranks=2"):
        fit(make_trainer, tmp_path, 2, devices=1)


def test_between_epochs_another_number_of_ranks_goes_on(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, 1, "epoch end")
    (alone,) = fit(make_trainer, tmp_path, 2, devices=1)
    assert len(alone["batches"]) == 2 * 8
