"""Beside other callbacks and options of the Trainer, in `lightning` and in `pytorch_lightning`."""

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from helpers.foreign import Classifier, Points, loader_of
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")


def minirec(budget=30, **options):
    selector = MiniRecSelector(gate=(-1.0, 2.0))
    return MiniRec(budget, selector=selector, rescore_fraction=1.0, probe=HeadProbe("classifier"), **options)


def sizes(module):
    return [len(module.rows(epoch)) for epoch in sorted(module.seen)]


def test_beside_the_usual_callbacks_and_clipping(make_trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val_loss", save_last=True)
    others = [saver, EarlyStopping("val_loss", patience=1, min_delta=10.0), LearningRateMonitor("step")]
    trainer = make_trainer(
        callbacks=[*others, minirec()],
        max_epochs=9,
        limit_val_batches=2,
        gradient_clip_val=0.1,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
    )
    module = Classifier()
    trainer.fit(module, loader_of(), loader_of())
    assert sizes(module) == [30, 30]
    assert saver.best_model_path
    assert saver.last_model_path
    trainer.validate(module, loader_of(), ckpt_path="best", verbose=False)
    assert sizes(module) == [30, 30]


def test_with_stochastic_weight_averaging(make_trainer):
    trainer = make_trainer(callbacks=[minirec(), StochasticWeightAveraging(0.05, swa_epoch_start=1)], max_epochs=3)
    module = Classifier()
    trainer.fit(module, loader_of())
    assert sizes(module) == [30, 30, 30]
    averaged = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.isfinite(averaged).all()
    assert not torch.equal(averaged, module.path[-1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_train_batches": 2}, [16, 16]),
        ({"limit_train_batches": 0.5}, [16, 16]),
        ({"fast_dev_run": True}, [8]),
        ({"reload_dataloaders_every_n_epochs": 1}, [30, 30]),
        ({"accumulate_grad_batches": 3}, [30, 30]),
        ({"max_epochs": -1, "max_steps": 3}, [24]),
    ],
)
def test_options_of_the_trainer(make_trainer, options, expected):
    module = Classifier()
    make_trainer(callbacks=[minirec()], **options).fit(module, loader_of(shuffle=True))
    assert sizes(module) == expected


def test_overfit_batches_switches_selection_off_and_says_so(make_trainer):
    module, plain = Classifier(), Classifier()
    with pytest.warns(UserWarning, match="nothing is selected in this run: use limit_train_batches"):
        make_trainer(callbacks=[minirec()], overfit_batches=2).fit(module, loader_of(shuffle=True))
    make_trainer(overfit_batches=2).fit(plain, loader_of(shuffle=True))
    assert module.seen == plain.seen
    assert torch.equal(module.path[-1], plain.path[-1])


def test_validation_sees_every_epoch_whatever_the_plans_length(make_trainer):
    class Count(Classifier):
        validations = 0

        def on_validation_start(self):
            self.validations += 1

    module = Count()
    make_trainer(callbacks=[minirec(warmup_epochs=1)], max_epochs=3, limit_val_batches=1).fit(
        module, loader_of(), loader_of()
    )
    assert sizes(module) == [60, 30, 30]
    assert module.validations == 3


@pytest.mark.parametrize("package", [lp, pl])
def test_in_projects_on_either_package(package, tmp_path):
    class Project(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.classifier, self.met = nn.Linear(4, 3), 0

        def forward(self, x):
            return self.classifier(x)

        def training_step(self, batch, batch_idx):
            self.met += len(batch[0])
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = Project()
        trainer = package.Trainer(
            max_epochs=epochs,
            callbacks=[minirec(0.25)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / "run",
        )
        trainer.fit(module, DataLoader(Points(), batch_size=8, shuffle=True), ckpt_path=ckpt_path)
        return trainer, module

    whole, module = fit(2)
    assert module.met == 2 * 15
    half, _ = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(2, tmp_path / "half.ckpt")
    assert resumed.met == 15
    assert torch.equal(resumed.classifier.weight, module.classifier.weight)
    assert len(session_of(whole).plan) == 15
