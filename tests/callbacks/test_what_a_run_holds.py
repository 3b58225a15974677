"""Processes, open files and threads: as many after each epoch, and as before once a run ends, fails or is stopped."""

import gc
import os
import signal

import pytest
import torch
from helpers.foreign import Classifier, Points, loader_of
from helpers.resources import Watch, held, held_at_rest
from helpers.slow import slow
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_collection():
    """Nothing may rely on the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def minirec(budget=30, **options):
    defaults = {
        "selector": MiniRecSelector(gate=(-1.0, 2.0)),
        "probe": HeadProbe("classifier"),
        "rescore_fraction": 0.0,
    }
    return MiniRec(budget, **{**defaults, **options})


def assert_level(watch, processes):
    """Every epoch holds what the first does."""
    assert watch.held == watch.held[:1] * 10
    assert watch.held[0].processes == processes


@pytest.mark.parametrize(
    ("workers", "persistent", "reload", "source"),
    [
        (0, False, 0, "fit"),
        (0, False, 1, "module"),
        slow(2, False, 0, "fit"),
        slow(2, False, 1, "module"),
        (2, True, 0, "fit"),
        (2, True, 1, "fit"),
        slow(2, True, 2, "module"),
        slow(2, True, 1, "module"),
    ],
)
def test_ten_epochs_of_a_foreign_loader(make_trainer, workers, persistent, reload, source):
    def make():
        return loader_of(shuffle=True, num_workers=workers, persistent_workers=persistent)

    before, watch = held(), Watch()
    trainer = make_trainer(callbacks=[watch, minirec()], max_epochs=10, reload_dataloaders_every_n_epochs=reload)
    module = Classifier(loader=make)
    trainer.fit(module, *([make()] if source == "fit" else []))
    assert held_at_rest(before) == before
    assert_level(watch, workers)
    starts = len({child for children in watch.children for child in children}) / max(workers, 1)
    if persistent:  # kept until the source gives another loader
        assert starts == (10 / reload if source == "module" else 1)
    assert [len(module.rows(epoch)) for epoch in range(10)] == [30] * 10


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), slow(2, False), slow(2, True)])
def test_ten_epochs_of_a_loader_around_our_sampler(make_trainer, workers, persistent):
    sampler, warmup = CurriculumSampler(range(60)), 3

    def make():
        return DataLoader(Points(), batch_size=8, sampler=sampler, num_workers=workers, persistent_workers=persistent)

    before, watch = held(), Watch()
    trainer = make_trainer(callbacks=[watch, minirec(warmup_epochs=warmup)], max_epochs=10)
    module = Classifier(loader=make)
    trainer.fit(module)
    assert held_at_rest(before) == before
    assert_level(watch, workers)
    assert [len(module.rows(epoch)) for epoch in range(10)] == [60] * warmup + [30] * 7


@pytest.mark.parametrize(("workers", "reload"), [(0, 0), slow(0, 1), slow(2, 0), slow(2, 1)])
def test_ten_epochs_of_our_data(make_trainer, toy_data, tiny_policy, workers, reload):
    before, watch = held(), Watch()
    trainer = make_trainer(
        callbacks=[watch, minirec(16, probe=None, warmup_epochs=1)],
        max_epochs=10,
        limit_val_batches=1,
        reload_dataloaders_every_n_epochs=reload,
    )
    module = GRPORecModule(tiny_policy(), num_generations=2, scoring_generations=2)
    trainer.fit(module, toy_data(num_workers=workers, pool_samples=24))
    assert held_at_rest(before) == before
    assert_level(watch, 2 * workers)  # of training and validation


class Broken(Points):
    """Fails at a row: in the main process, or in the worker that loads it."""

    def __getitem__(self, row):
        if row == 17 and len(self.y) == 60:
            raise RuntimeError("out of luck")
        return super().__getitem__(row)


class Failing(Classifier):
    where = None

    def training_step(self, batch, batch_idx):
        if self.where == "training_step" and batch_idx == 1:
            raise RuntimeError("out of luck")
        if self.where == "Ctrl-C" and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.where == "validation_step" and not self.trainer.sanity_checking:
            raise RuntimeError("out of luck")


class FailingProbe(HeadProbe):
    def __call__(self, module, batch, sample_id, gradient="first"):
        if module.where == "scoring" and module.current_epoch == 0 and module.seen:
            raise RuntimeError("out of luck")
        return super().__call__(module, batch, sample_id, gradient)


PLACES = ["training_step", "validation_step", "validation data", "scoring", "data", "Ctrl-C"]
FAST = [
    ("validation data", 2, True),
    ("scoring", 2, False),
    ("data", 2, False),
    ("Ctrl-C", 2, True),
    ("data", 0, False),
]
CASES = [(where, *workers) for where in PLACES for workers in ((0, False), (2, False), (2, True))]


@pytest.mark.parametrize(("where", "workers", "persistent"), [case if case in FAST else slow(*case) for case in CASES])
def test_a_fit_of_a_foreign_loader_that_fails(make_trainer, tmp_path, where, workers, persistent):
    options = {"batch_size": 8, "num_workers": workers, "persistent_workers": persistent}
    module, before = Failing(), held()
    module.where = where
    trainer = make_trainer(
        callbacks=[
            minirec(1.0, curriculum="shuffled", rescore_fraction=1.0)
            if where == "data"
            else minirec(probe=FailingProbe("classifier"), rescore_fraction=1.0),
            ModelCheckpoint(tmp_path, save_on_exception=True),
        ],
        limit_val_batches=1.0,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    train = DataLoader((Broken if where == "data" else Points)(), shuffle=True, **options)
    val = DataLoader((Broken if where == "validation data" else Points)(), **options)
    with pytest.raises(SystemExit if where == "Ctrl-C" else RuntimeError) as failure:
        trainer.fit(module, train, val)
    assert failure.value.__traceback__ is not None  # which still holds iterators
    assert held_at_rest(before) == before


@pytest.mark.parametrize(
    ("stage", "workers"),
    [
        ("training_step", 2),
        slow("training_step", 0),
        slow("validation_step", 2),
        slow("sample_signals", 2),
        slow("Ctrl-C", 2),
        slow("test_step", 2),
    ],
)
def test_a_run_of_our_data_that_fails(make_trainer, toy_data, tiny_policy, workers, stage):
    def fail(*_, **__):
        if stage == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("out of luck")

    module = GRPORecModule(tiny_policy(), num_generations=2, scoring_generations=2)
    setattr(module, "training_step" if stage == "Ctrl-C" else stage, fail)
    before = held()
    trainer = make_trainer(callbacks=[minirec(16, probe=None, rescore_fraction=1.0)], limit_val_batches=1.0)
    run = trainer.test if stage == "test_step" else trainer.fit
    data = toy_data(num_workers=workers, pool_samples=24, eval_batch_size=8)
    with pytest.raises(SystemExit if stage == "Ctrl-C" else RuntimeError):
        run(module, datamodule=data)
    assert held_at_rest(before) == before


def test_an_interrupted_loader_around_our_sampler_can_be_used_again(make_trainer):
    loader = DataLoader(
        Points(), batch_size=8, sampler=CurriculumSampler(range(60)), num_workers=2, persistent_workers=True
    )
    module = Failing()
    module.where = "validation_step"
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(callbacks=[minirec()], limit_val_batches=1.0).fit(module, loader, loader_of())
    again = Failing()
    make_trainer(callbacks=[minirec()], max_epochs=1).fit(again, loader)
    assert len(again.rows(0)) == 30


@pytest.mark.slow
@pytest.mark.parametrize(  # an epoch has four batches
    ("reload", "source", "save_at"),
    [
        (1, "fit", 4),
        (1, "fit", 6),
        (1, "module", 4),
        (1, "module", 6),
        (0, "module", 8),
        (2, "module", 8),
        (2, "module", 12),
    ],
)
def test_workers_that_are_kept_or_renewed_resume(make_trainer, tmp_path, reload, source, save_at):
    class Save(Callback):
        met = 0

        def on_train_batch_end(self, trainer, *_):
            self.met += 1
            if self.met == save_at:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def run(resumed):
        def make():
            return loader_of(shuffle=True, num_workers=2, persistent_workers=True)

        module = Classifier(dropout=0.4, loader=make)
        torch.manual_seed(4 if resumed else 3)
        callbacks = [minirec(rescore_fraction=0.5), *([] if resumed else [Save()])]
        trainer = make_trainer(callbacks=callbacks, max_epochs=4, reload_dataloaders_every_n_epochs=reload)
        ckpt_path = tmp_path / "saved.ckpt" if resumed else None
        trainer.fit(module, make() if source == "fit" else None, ckpt_path=ckpt_path)
        return module, torch.get_rng_state()

    (whole, numbers), (resumed, resumed_numbers) = run(False), run(True)
    assert resumed.batches == whole.batches[save_at:]
    assert torch.equal(resumed.path[-1], whole.path[-1])
    assert torch.equal(resumed_numbers, numbers)
