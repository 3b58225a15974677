"""What a checkpoint knows of its data: in a project of one's own, in version 0.1, and where a change is allowed."""

import json

import pytest
import torch
from helpers.cli_tools import sentence
from helpers.foreign import Classifier, Points, loader_of
from helpers.identity_world import documented
from helpers.paths import REPOSITORY
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.cli.main import main
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.identity import IDENTITY_KEY
from minirec_pl.utils.errors import InputError

FOREIGN = documented(REPOSITORY / "docs" / "identity.md", "## In a project of your own")
NUMBER, IDS, CONTENT, FINGERPRINT = (row for row, _ in FOREIGN)


def points(change=""):
    """The dataset of a project that knows nothing of us; those that are known by ids or a text have them."""
    data = Points(n=50 if change == NUMBER else 60)
    if change in ("ids", IDS):
        data.sample_ids = list(range(60)) if change == "ids" else list(range(1, 61))
    if change in ("print", FINGERPRINT):
        data.fingerprint = "one" if change == "print" else "two"
    if change == CONTENT:
        data.x[0, 1] += 1
    return data


def run(make_trainer, data, epochs=1, checkpoint=None, allow=False, **options):
    selector = MiniRecSelector(gate=(0.0, 1.0))
    callback = MiniRec(0.5, selector=selector, probe=HeadProbe("classifier", forward=0, target=1))
    trainer = make_trainer(callbacks=[callback], max_epochs=epochs)
    trainer.allow_changed_data = allow
    loader = DataLoader(data, batch_size=8, shuffle=True, **options)
    trainer.fit(Classifier(), loader, ckpt_path=checkpoint)
    return trainer


BEFORE = {NUMBER: "", IDS: "ids", CONTENT: "", FINGERPRINT: "print"}
SAID = {
    NUMBER: "the dataset is 50 samples here and 60 samples there",
    IDS: "the dataset differs",
    CONTENT: "item 0 of the dataset differs",
    FINGERPRINT: "the dataset fingerprint is two here and one there",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", BEFORE)
def test_a_changed_dataset_of_another_project_is_refused(row, make_trainer, tmp_path):
    assert FOREIGN[row, "resumed fit"] == "refused"
    run(make_trainer, points(BEFORE[row])).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="the checkpoint was made for something else") as refused:
        run(make_trainer, points(row), 2, tmp_path / "a.ckpt")
    assert SAID[row] in str(refused.value)
    run(make_trainer, points(BEFORE[row]), 2, tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_reading_items_disturbs_nothing_and_leaves_out_what_is_random(make_trainer, tmp_path):
    class Counted(Points):
        reads = 0

        def __getitem__(self, row):
            self.reads += 1
            return super().__getitem__(row)

    read, spared = Counted(noise=True), Counted(noise=True)
    spared.fingerprint = "mine"
    torch.manual_seed(0)
    trainer = run(make_trainer, read)
    torch.manual_seed(0)
    other = run(make_trainer, spared)
    assert read.reads - spared.reads == 32
    assert trainer.lightning_module.batches == other.lightning_module.batches
    state = torch.get_rng_state()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(torch.get_rng_state(), state)
    assert read.reads - spared.reads == 32
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)[IDENTITY_KEY]) == {"dataset", "dataset_fingerprint"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_workers_of_a_loader_read_the_items(make_trainer, tmp_path):
    run(make_trainer, points(), num_workers=2).save_checkpoint(tmp_path / "a.ckpt")
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)[IDENTITY_KEY]) == 18
    with pytest.raises(InputError, match="item 0 of the dataset differs"):
        run(make_trainer, points(CONTENT), 2, tmp_path / "a.ckpt", num_workers=2)


@pytest.mark.filterwarnings("ignore")
def test_another_pool_that_is_allowed_starts_the_selection_anew(make_trainer, tmp_path):
    run(make_trainer, points()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="which is allowed: the dataset is 50 samples here and 60 samples there"):
        trainer = run(make_trainer, points(NUMBER), 2, tmp_path / "a.ckpt", allow=True)
    assert len(trainer._minirec_session.store) == 50
    assert len(trainer._minirec_session.selected) == 25


def test_the_loader_of_a_datamodule_that_is_left_out_is_known_by_its_samples(
    toy_data, tiny_policy, make_trainer, tmp_path
):
    data = toy_data()
    data.setup("fit")
    module = GRPORecModule(tiny_policy(), num_generations=2)
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(module, data.train_dataloader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = toy_data(history_window=3)
    other.setup("fit")
    with pytest.raises(InputError, match="of the dataset differs"):
        make_trainer(max_epochs=2).fit(
            GRPORecModule(tiny_policy(), num_generations=2), other.train_dataloader(), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.fixture
def checkpoint(toy_data, tiny_policy, make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(GRPORecModule(tiny_policy(), num_generations=2), datamodule=toy_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_checkpoint_that_says_nothing_resumes_with_one_warning(checkpoint, toy_data, tiny_policy, make_trainer):
    content = torch.load(checkpoint, weights_only=True)
    del content[IDENTITY_KEY]
    torch.save(content, checkpoint)
    trainer = make_trainer(max_epochs=2, limit_train_batches=1)
    with pytest.warns(UserWarning, match="does not say what it was made for") as caught:
        trainer.fit(
            GRPORecModule(tiny_policy(), num_generations=2),
            datamodule=toy_data(pool_samples=20),
            ckpt_path=checkpoint,
        )
    assert len([w for w in caught if "cannot be checked" in str(w.message)]) == 1
    assert trainer.current_epoch == 2


def test_a_checkpoint_of_another_module_is_refused(checkpoint, toy_data, tiny_policy, make_trainer):
    with pytest.raises(InputError, match="the module is WarmStartModule here and GRPORecModule there"):
        make_trainer().fit(WarmStartModule(tiny_policy()), datamodule=toy_data(), ckpt_path=checkpoint)


def test_an_allowed_change_is_kept_in_the_results(command, tmp_path, capsys):
    root = tmp_path / "runs"
    assert main(command.grpo(root, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")) == 0
    first = json.loads((root / "version_0" / "results.json").read_text())
    resumed = ["fit", "--ckpt_path", str(root / "version_0" / "checkpoints" / "last.ckpt"), "--data.pool_samples=40"]
    resumed.append("--trainer.max_epochs=2")
    capsys.readouterr()
    assert main(resumed) == 2
    assert "(the training part is the pool, 40 samples here and the pool, 153 samples there)" in sentence(capsys)
    with pytest.warns(UserWarning, match="which is allowed"):
        assert main([*resumed, "--allow_changed_data=true"]) == 0
    results = json.loads((root / "version_0" / "results.json").read_text())
    (data,) = results["changed"]["data"]
    assert data.startswith("the training part is the pool, 40 samples here")
    assert "data.init_args.pool_samples null -> 40" in results["changed"]["options"]
    assert first["data"] == results["data"]
    assert "changed" not in first


def test_a_datamodule_of_ones_own_is_known_by_its_fingerprint(make_trainer, tmp_path):
    from helpers.foreign import Data

    def fit(fingerprint, epochs, checkpoint=None):
        data = Data(lambda: loader_of())
        data.fingerprint = fingerprint
        callback = MiniRec(
            0.5, selector=MiniRecSelector(gate=(0.0, 1.0)), probe=HeadProbe("classifier", forward=0, target=1)
        )
        trainer = make_trainer(callbacks=[callback], max_epochs=epochs)
        trainer.fit(Classifier(), datamodule=data, ckpt_path=checkpoint)
        return trainer

    fit("one", 1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="the data is two here and one there"):
        fit("two", 2, tmp_path / "a.ckpt")
    fit("one", 2, tmp_path / "a.ckpt")
