"""`trainer.estimated_stepping_batches`, read in `configure_optimizers`, is that of the plans."""

import math

import pytest
import torch
from helpers.foreign import Classifier, Points, loader_of
from torch.utils.data import DataLoader

from minirec_pl.callbacks import MiniRec, RescoreSamples, SelectSamples
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import FullSelector, MiniRecSelector, RandomSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Reads(Classifier):
    told = None

    def configure_optimizers(self):
        self.told = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


class OneCycle(Reads):
    """Its schedule raises an error at a step beyond the number it was told."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.told)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def minirec(budget, **options):
    options = {"selector": MiniRecSelector(gate=(-1.0, 2.0)), "probe": HeadProbe("classifier"), **options}
    return MiniRec(budget, rescore_fraction=1.0, **options)


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        (lambda: minirec(30), {}),
        (lambda: minirec(0.25), {"accumulate_grad_batches": 3}),
        (lambda: minirec(20, every_n_epochs=2), {"limit_train_batches": 2}),
        (lambda: minirec(30), {"limit_train_batches": 0.5}),
        (lambda: minirec(9), {"max_steps": 4}),
        (lambda: minirec(1.0, curriculum="shuffled"), {}),
        (lambda: minirec(20, selector=FullSelector()), {}),
        (lambda: RescoreSamples(0.5, HeadProbe("classifier")), {}),
    ],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_it_is_the_number_of_steps_that_are_taken(make_trainer, callback, options, drop_last):
    module = OneCycle()
    trainer = make_trainer(callbacks=[callback()], max_epochs=3, **options)
    trainer.fit(module, loader_of(shuffle=True, drop_last=drop_last))
    assert module.told == trainer.global_step


@pytest.mark.parametrize(("warmup", "accumulate"), [(1, 1), (2, 3), (9, 1)])
def test_with_a_warmup_it_is_rounded_up_to_whole_steps_an_epoch(make_trainer, warmup, accumulate):
    module = OneCycle()
    callback = minirec(20, warmup_epochs=warmup)
    trainer = make_trainer(callbacks=[callback], max_epochs=4, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader_of(shuffle=True))
    assert module.told == 4 * math.ceil(trainer.global_step / 4)


def test_a_fixed_ledger_is_counted_by_its_picks(make_trainer, tmp_path):
    first = make_trainer(callbacks=[minirec(24)], max_epochs=1)
    first.fit(Classifier(), loader_of())
    ledger = str(tmp_path / "run" / "ledger.parquet")
    for budget, steps in ((None, 3), (12, 2)):
        module = OneCycle()
        make_trainer(callbacks=[SelectSamples(budget, ledger=ledger)]).fit(module, loader_of())
        assert module.told == 2 * steps


def test_a_loader_around_our_sampler_and_a_resumed_run(make_trainer, tmp_path):
    sampler = CurriculumSampler(range(60))

    def loader():
        return DataLoader(Points(), batch_size=8, sampler=sampler)

    def fit(epochs, ckpt_path=None):
        module = Reads(loader=loader)
        callback = MiniRec(20, selector=RandomSelector(redraw=True), curriculum="shuffled")
        trainer = make_trainer(callbacks=[callback], max_epochs=epochs)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, module

    whole, module = fit(3)
    assert module.told == whole.global_step == 9
    half, _ = fit(3)
    half.save_checkpoint(tmp_path / "end.ckpt")
    resumed, module = fit(4, tmp_path / "end.ckpt")
    assert module.told == 12
    assert len(module.rows(3)) == 20
    assert session_of(resumed).plan == module.rows(3)


def test_reading_it_changes_no_batch_and_no_weight(make_trainer):
    """Everything selected and not reordered: as without the callback, which also reads it."""

    paths = []
    for callbacks in ([], [minirec(1.0, curriculum="shuffled")]):
        module = Reads(dropout=0.4)
        make_trainer(callbacks=callbacks).fit(module, loader_of(shuffle=True, noise=True))
        paths.append((module.batches, torch.stack(module.path)))
    assert paths[0][0] == paths[1][0]
    assert torch.equal(paths[0][1], paths[1][1])
