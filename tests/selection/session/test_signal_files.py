"""Checkpoints stay small: the vectors lie in `signals/`, are found again, and go when no checkpoint names them."""

import shutil

import pytest
import torch
from helpers.foreign import Classifier, loader_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from minirec_pl import InputError
from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:selection"),
    pytest.mark.filterwarnings("ignore:picked"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


def minirec():
    return MiniRec(0.5, selector=MiniRecSelector(gate=(-1.0, 2.0)), rescore_fraction=1.0, probe=HeadProbe("classifier"))


def fit(make_trainer, folder, ckpt_path=None, epochs=3, keep=1):
    saver = ModelCheckpoint(folder / "checkpoints", save_top_k=keep, every_n_epochs=1, filename="{epoch}")
    trainer = make_trainer(
        callbacks=[minirec(), saver], enable_checkpointing=True, default_root_dir=folder, max_epochs=epochs
    )
    module = Classifier()
    trainer.fit(module, loader_of(), ckpt_path=ckpt_path)
    return trainer, module


def names(folder):
    return {path.name for path in (folder / "signals").iterdir()}


def test_a_checkpoint_names_its_file_and_holds_no_vectors(make_trainer, tmp_path):
    trainer, _ = fit(make_trainer, tmp_path, epochs=2)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["minirec_pl.SelectionSession"]
    assert not {"gradient", "embedding"} & set(state["store"])
    assert state["vectors"] in names(tmp_path)
    assert set(session_of(trainer).store.vectors()) == {"gradient", "embedding"}


@pytest.mark.parametrize(("keep", "files"), [(1, 1), (-1, 3)])
def test_files_go_with_the_checkpoints_that_named_them(make_trainer, tmp_path, keep, files):
    fit(make_trainer, tmp_path, epochs=4, keep=keep)
    named = set()
    for checkpoint in (tmp_path / "checkpoints").glob("*.ckpt"):
        named.add(torch.load(checkpoint, weights_only=True)["minirec_pl.SelectionSession"]["vectors"])
    assert names(tmp_path) == named
    assert len(named) == files  # the last epoch plans no further one, so its checkpoint shares a file


def test_a_checkpoint_elsewhere_keeps_its_file(make_trainer, tmp_path):
    run = tmp_path / "run"
    trainer, _ = fit(make_trainer, run, epochs=1)
    trainer.save_checkpoint(tmp_path / "elsewhere" / "kept.ckpt")
    kept = torch.load(tmp_path / "elsewhere" / "kept.ckpt", weights_only=True)["minirec_pl.SelectionSession"]["vectors"]
    shutil.rmtree(run / "checkpoints")
    fit(make_trainer, run, ckpt_path=tmp_path / "elsewhere" / "kept.ckpt", epochs=4)
    assert kept in names(run)


@pytest.mark.parametrize("where", ["beside", "beside/signals", "run"])
def test_the_file_is_looked_for_beside_the_checkpoint_then_in_its_run(make_trainer, tmp_path, where):
    _, whole = fit(make_trainer, tmp_path / "whole", epochs=3)
    fit(make_trainer, tmp_path / "first", epochs=2)
    (checkpoint,) = (tmp_path / "first" / "checkpoints").glob("*.ckpt")
    moved = tmp_path / "moved" / "saved.ckpt"
    moved.parent.mkdir()
    shutil.copy(checkpoint, moved)
    if where != "run":
        place = moved.parent / ("signals" if where.endswith("signals") else ".")
        place.mkdir(exist_ok=True)
        for path in (tmp_path / "first" / "signals").iterdir():
            shutil.move(path, place / path.name)
    _, resumed = fit(make_trainer, tmp_path / "second", ckpt_path=moved, epochs=3)
    assert torch.equal(whole.path[-1], resumed.path[-1])


def test_absence_and_damage_are_clear_errors(make_trainer, tmp_path):
    fit(make_trainer, tmp_path / "first", epochs=2)
    (checkpoint,) = (tmp_path / "first" / "checkpoints").glob("*.ckpt")
    (file,) = (tmp_path / "first" / "signals").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(InputError, match="is damaged, its content is not what its name says"):
        fit(make_trainer, tmp_path / "second", ckpt_path=checkpoint)
    file.unlink()
    with pytest.raises(InputError, match=rf"goes with {file.name}.*copy it from the folder signals/"):
        fit(make_trainer, tmp_path / "second", ckpt_path=checkpoint)
    make_trainer(callbacks=[minirec()], limit_val_batches=1).validate(Classifier(), loader_of(), ckpt_path=checkpoint)


def test_without_a_logger_nothing_is_written_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet = {**options, "enable_checkpointing": False, "limit_val_batches": 0}

    def fit(epochs, ckpt_path=None):
        trainer, module = Trainer(max_epochs=epochs, callbacks=[minirec()], **quiet), Classifier()
        trainer.fit(module, loader_of(), ckpt_path=ckpt_path)
        return trainer, module

    _, whole = fit(4)
    trainer, _ = fit(2)
    assert list(tmp_path.iterdir()) == []
    trainer.save_checkpoint(tmp_path / "kept" / "last.ckpt")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "last.ckpt"]
    elsewhere = tmp_path / "moved.ckpt"
    shutil.move(tmp_path / "kept" / "last.ckpt", elsewhere)
    resumed, module = fit(4, elsewhere)
    assert set(session_of(resumed).store.vectors()) == {"gradient", "embedding"}
    assert torch.equal(whole.path[-1], module.path[-1])


class _Elsewhere(Logger):
    """A logger that writes no files, as many do."""

    name, version = "project", "run1"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_without_a_folder_has_its_run_where_its_checkpoints_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=_Elsewhere(), callbacks=[minirec()], enable_progress_bar=False
    )
    trainer.fit(Classifier(), loader_of())
    assert [path.name for path in tmp_path.iterdir()] == ["project"]
    assert {"ledger.parquet", "signals", "checkpoints"} <= {path.name for path in (tmp_path / "project/run1").iterdir()}
