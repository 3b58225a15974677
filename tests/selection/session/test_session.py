"""The session of a Trainer, and what a fit leaves of its last selection: when it ends or is broken off."""

import copy
import gc
import json
import weakref
from multiprocessing.reduction import ForkingPickler

import pandas as pd
import pytest
import torch
from helpers.foreign import Classifier, loader_of
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RescoreSamples, SelectSamples
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector, RandomSelector, SelectionLedger, SignalStore
from minirec_pl.selection.session import run_files
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")
FILES = {"ledger.parquet", "diagnostics.json", "signals.safetensors"}


class Look(Callback):
    """Which of the files were there when an epoch began; breaks off in one."""

    def __init__(self, folder, stop=None):
        self.folder, self.stop, self.found = folder, stop, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.found.append(FILES & {path.name for path in self.folder.glob("*")})
        if trainer.current_epoch == 2 and self.stop is not None:
            raise self.stop


def minirec(**options):
    options = {"selector": MiniRecSelector(gate=(-1.0, 2.0)), "probe": HeadProbe("classifier"), **options}
    return MiniRec(20, rescore_fraction=0.5, **options)


def left(folder, trainer):
    session = session_of(trainer)
    ledger = SelectionLedger.from_parquet(folder / "ledger.parquet")
    pd.testing.assert_frame_equal(ledger.table, session.ledger.table)
    assert ledger.selected() == session.selected
    assert json.loads((folder / "diagnostics.json").read_text())["n_selected"] == 20
    assert SignalStore.load(folder / "signals.safetensors").digest() == session.store.digest()


@pytest.mark.parametrize("pause", [0.0, 3600.0])
def test_files_are_written_at_the_end_and_before_only_after_a_pause(make_trainer, tmp_path, monkeypatch, pause):
    monkeypatch.setattr(run_files, "_PAUSE", pause)
    look = Look(tmp_path / "run")
    trainer = make_trainer(callbacks=[minirec(), look], max_epochs=3)
    trainer.fit(Classifier(), loader_of())
    assert look.found == [FILES if pause == 0.0 else set()] * 3
    left(tmp_path / "run", trainer)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("no more memory")])
def test_a_fit_that_is_broken_off_leaves_its_last_selection(make_trainer, tmp_path, stop):
    trainer = make_trainer(callbacks=[minirec(), Look(tmp_path / "run", stop)], max_epochs=5)
    with pytest.raises((type(stop), SystemExit)):
        trainer.fit(Classifier(), loader_of())
    assert trainer.current_epoch == 2
    left(tmp_path / "run", trainer)


def test_an_error_before_the_first_selection_is_told_as_it_is(make_trainer, tmp_path):
    with pytest.raises(Exception, match="has no layer 'missing'"):
        make_trainer(callbacks=[minirec(probe=HeadProbe("missing"))]).fit(Classifier(), loader_of())
    assert not list((tmp_path / "run").glob("*"))


def test_single_callbacks_leave_the_same_files_as_minirec(make_trainer, tmp_path):
    tables = []
    for name in ("one", "parts"):
        selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("classifier")
        parts = [RescoreSamples(0.5, probe), SelectSamples(20, selector)]
        callbacks = parts if name == "parts" else [minirec(curriculum="shuffled")]
        make_trainer(callbacks=callbacks, default_root_dir=tmp_path / name).fit(Classifier(), loader_of())
        tables.append(SelectionLedger.from_parquet(tmp_path / name / "ledger.parquet").table)
    pd.testing.assert_frame_equal(*tables)


def test_with_a_logger_every_selection_is_logged(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version="0")
    make_trainer(callbacks=[minirec()], max_epochs=3, logger=logger).fit(Classifier(), loader_of())
    rows = pd.read_csv(tmp_path / "log" / "0" / "metrics.csv")
    for name in ("size", "pool", "novelty_share", "learnability_weight"):
        assert rows[f"selection/{name}"].notna().sum() == 3


def test_everything_selected_and_not_reordered_scores_selects_and_writes_nothing(make_trainer, tmp_path):
    callback = MiniRec(1.0, curriculum="shuffled", probe=HeadProbe("missing"))
    trainer = make_trainer(callbacks=[callback])
    module = Classifier()
    trainer.fit(module, loader_of())
    session = session_of(trainer)
    assert session.ledger is None
    assert session.plan is None
    assert not session.scored
    assert set(session.cost.seconds.values()) == {0.0}
    assert not list((tmp_path / "run").glob("*"))
    assert torch.isfinite(module.path[-1]).all()


class Keeps(EasyToHardCurriculum):
    """Keeps the Trainer, as callbacks of users do."""

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer
        super().setup(trainer, pl_module, stage)


def test_a_session_is_there_before_the_fit_and_goes_with_its_trainer(make_trainer):
    trainer = make_trainer(callbacks=[minirec(curriculum=Keeps())])
    session = session_of(trainer)
    assert not session.ready
    assert session_of(make_trainer()) is not session
    for fits in (1, 2):
        trainer.fit_loop.max_epochs = 2 * fits
        trainer.fit(Classifier(), loader_of())
        assert session_of(trainer) is session
        assert session.plan_epoch == 2 * fits - 1
    gone = weakref.ref(session)
    del trainer, session
    gc.collect()
    assert gone() is None


def spawned(trainer):
    """What a process that multiprocessing spawns gets of a Trainer."""
    return ForkingPickler.loads(ForkingPickler.dumps(trainer))


@pytest.mark.parametrize("copied", [copy.deepcopy, spawned])
def test_a_copied_trainer_has_a_session_of_its_own(make_trainer, toy_data, tiny_policy, copied):
    """A script copies a Trainer; the processes that a strategy spawns unpickle one."""

    def fit(trainer):
        trainer.fit(GRPORecModule(tiny_policy(), num_generations=2, optimizer=torch.optim.SGD), toy_data())

    trainer = make_trainer(callbacks=[MiniRec(12, selector=RandomSelector(), curriculum="shuffled")])
    session, other = session_of(trainer), copied(trainer)
    fit(other)
    assert session_of(other).plan_epoch == 1
    assert not session.ready
    fit(trainer)
    plan, other = session.plan, copy.deepcopy(trainer)
    other.fit_loop.max_epochs = 4
    fit(other)
    assert session_of(other).plan_epoch == 3
    assert session_of(trainer) is session
    assert session.plan == plan
