"""Classes and functions of files in the user's folder: every command finds them, and says what one lacks."""

import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.cli_tools import QUIET, sentence
from helpers.documents import blocks, shell_of
from helpers.own_tables import log_frame
from helpers.paths import REPOSITORY
from lightning.pytorch import LightningDataModule

from minirec_pl import InputError
from minirec_pl.cli.check import _made
from minirec_pl.cli.main import main
from minirec_pl.selection import SelectionLedger, SignalStore
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.trainers.recommender import RecModule

PARTS = """
import pandas as pd

from minirec_pl.callbacks import Curriculum
from minirec_pl.data.sources.assemble import from_interactions
from minirec_pl.data.sources.tables import Table
from minirec_pl.selection import SampleSignals
from minirec_pl.selection.selectors.picks import best_first, ledger_of


class Latest:
    needs = {"rewards"}

    def __init__(self, sign):
        self.sign = sign

    def select(self, signals, k, *, epoch=0):
        value = self.sign * signals.sample_id.double()
        return ledger_of(signals, best_first(value, k), k, {"value": value}, {})


class Backwards(Curriculum):
    def __init__(self):
        super().__init__(seed=0)

    def plan(self, session, trainer, chosen, easiness, epoch):
        return sorted(chosen, reverse=True)


def constant(completions, sample_id):
    return [0.5 * (c > "i3") for c in completions]


def measured(module, batch):
    rewards = module.sample_signals(batch).rewards
    return SampleSignals(batch["sample_id"], rewards=rewards * 0 + 0.25, embedding=batch["history"].double())


class Log:
    def __init__(self, path):
        self.path = path

    def read(self):
        return from_interactions(Table(self.path, pd.read_csv(self.path)), items=None, item_text=())
"""
CONFIG = {
    "model": {
        "class_path": "minirec_pl.GRPORecModule",
        "init_args": {
            "policy": {"class_path": "my_policy.BagOfItems"},
            "rewards": ["minirec_pl.rewards.hit", "parts.constant"],
            "num_generations": 4,
        },
    },
    "data": {
        "class_path": "minirec_pl.RecDataModule",
        "init_args": {
            "source": {"class_path": "parts.Log", "init_args": {"path": "log.csv"}},
            "warm_fraction": 0.5,
            "history_window": 10,
            "batch_size": 16,
        },
    },
    "selection": {
        "class_path": "minirec_pl.callbacks.MiniRec",
        "init_args": {
            "budget": 20,
            "selector": {"class_path": "parts.Latest", "init_args": {"sign": -1}},
            "curriculum": {"class_path": "parts.Backwards"},
            "probe": "parts.measured",
        },
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": "runs"},
}
STUDY = {
    "config": "own.yaml",
    "datasets": [{"name": "log", "overrides": {}}],
    "budgets": [0.2],
    "seeds": [1],
    "epochs": 1,
    "references": ["random"],
    "overrides": {},
    "methods": {
        "random": {"overrides": {"selection.selector": "minirec_pl.selection.RandomSelector"}},
        "latest": {"overrides": {"selection.selector.sign": 1}},
    },
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a log, files of one's own, and a config that names them."""
    (tmp_path / "parts.py").write_text(PARTS)
    log_frame(n=1500, n_users=25, n_moments=600, n_items=60).to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    (block,) = [one for one in blocks(REPOSITORY / "docs" / "extending.md") if "class BagOfItems" in one.text]
    shell_of(tmp_path)([sys.executable, "-c", block.text])
    return tmp_path


@pytest.mark.slow
def test_every_command_finds_what_the_folder_holds(folder):
    run = shell_of(folder)
    quiet, trained = " ".join(QUIET), "--model.policy.pretrained=runs/latest/policy"

    assert "60" in run("minirec data describe --config own.yaml").stdout
    assert "nothing stands in the way" in run("minirec check --config own.yaml").stdout
    run(f"minirec fit --config own.yaml {quiet}")
    ledger = SelectionLedger.from_parquet(folder / "runs/latest/ledger.parquet")
    plan = pd.read_parquet(folder / "runs/latest/plan.parquet")["sample_id"].tolist()
    assert ledger.selected() == sorted(ledger.table["sample_id"])[:20]
    assert plan == sorted(ledger.selected(), reverse=True)

    run(f"minirec score --config own.yaml --to scored {trained}")
    assert SignalStore.load(folder / "scored/signals.safetensors").pool_view(0).reward_mean.unique().tolist() == [0.25]
    run("minirec select scored/signals.safetensors --selector parts.Latest --selector.sign=1 --budget 5 --to selected")
    assert np.load(folder / "selected/selected.npy").tolist() == sorted(ledger.table["sample_id"])[:-6:-1]
    for command in ("validate", "test", "predict"):
        run(f"minirec {command} --config own.yaml {quiet} {trained}")
    assert len(list(folder.glob("runs/version_*/predictions.parquet"))) == 1
    run("minirec report runs/latest --to report.html")
    with pytest.raises(AssertionError, match=r"is a my_policy.BagOfItems, which has no language model to export: load"):
        run("minirec export runs/latest/policy --to exported")


@pytest.mark.slow
def test_the_worker_processes_of_a_study_find_it_too(folder):
    config = {**CONFIG, "warm_start": {"train_on": "warm_samples", "epochs": 1}}
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    study = {**STUDY, "config": str(folder / "own.yaml")}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    shell_of(folder)("minirec compare --config study.yaml --to compared --jobs 2")
    assert len(list(folder.glob("compared/cells/**/*.safetensors"))) == 2


WRONG = """
from minirec_pl.callbacks import Curriculum
from minirec_pl.policy import Policy


class NoSelect:
    needs = frozenset()


class NoEpoch(NoSelect):
    def select(self, signals, k): ...


class NoNeeds:
    def select(self, signals, k, *, epoch=0): ...


class Needs(NoNeeds):
    needs = {"loss"}


class NoPlan(Curriculum):
    def _plan(self, session, trainer, chosen, easiness, epoch): ...


class Half(Policy):
    def bind(self, catalogue): ...


class Empty:
    pass


def function(): ...
"""


SELECTION, DATA, MODEL = SessionCallback | None, LightningDataModule, RecModule
CLASSES = {SELECTION: "callbacks.MiniRec", DATA: "RecDataModule", MODEL: "GRPORecModule"}


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """A working folder with the file above, and one that an installed module hides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.path.append(sys.path.pop(0))  # as `minirec` has it
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "selectors.py").write_text("class Any: ...")
    yield tmp_path
    sys.modules.pop("wrong", None)


@pytest.mark.parametrize(
    ("kind", "option", "value", "words"),
    [
        (
            SELECTION,
            "selector",
            "wrong.NoSelect",
            "wrong.NoSelect has no method select: define `select(self, signals, k, *, epoch=0)`",
        ),
        (
            SELECTION,
            "selector",
            "wrong.NoEpoch",
            "wrong.NoEpoch.select(self, signals, k) does not take what it is given: define `sel",
        ),
        (
            SELECTION,
            "selector",
            "wrong.function",
            "wrong.function is a function and no class: give a class with `select(self, signa",
        ),
        (SELECTION, "selector", "wrong.NoNeeds", "NoNeeds has no `needs`: set it to the signals that select reads"),
        (
            SELECTION,
            "selector",
            "wrong.Needs",
            "Needs.needs is {'loss'}: give a frozenset out of embedding, gradient, rewards",
        ),
        (
            SELECTION,
            "curriculum",
            "wrong.NoPlan",
            "wrong.NoPlan has no method plan: define `plan(self, session, trainer, chosen",
        ),
        (
            SELECTION,
            "curriculum",
            "wrong.Empty",
            "wrong.Empty is no Curriculum: derive it from minirec_pl.callbacks.Curriculum and",
        ),
        (
            SELECTION,
            "curriculum",
            "wrong.function",
            "wrong.function is a function and no class: give a class with `plan(",
        ),
        (
            SELECTION,
            "probe",
            "wrong.Empty",
            "the objects of wrong.Empty cannot be called: give a function, or a class with",
        ),
        (
            SELECTION,
            "probe",
            "wrong.function",
            "the probe function does not take what it is given: define `function(module, batc",
        ),
        (DATA, "source", "wrong.Empty", "wrong.Empty has no method read: define `read(self)`"),
        (
            MODEL,
            "policy",
            "wrong.Half",
            "wrong.Half has no method completion_pass, item_logps, roll_out, rollout_length, save_",
        ),
        (
            MODEL,
            "policy",
            "wrong.Empty",
            "wrong.Empty is no Policy: derive it from minirec_pl.policy.Policy and define the",
        ),
        (
            MODEL,
            "rewards",
            ["wrong.Empty"],
            "the objects of wrong.Empty cannot be called: give a function, or a class with",
        ),
        (
            SELECTION,
            "selector",
            "absent.Any",
            "there is no module absent, which 'absent.Any' is to be taken from: put absent.py",
        ),
        (SELECTION, "selector", "selectors.Any", "selectors.py in this folder is hidden by /"),
    ],
)
@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_class_that_a_config_names_is_told_what_it_lacks(wrong, kind, option, value, words, as_mapping):
    if as_mapping and isinstance(value, str) and option != "probe":
        value = {"class_path": value}
    with pytest.raises(InputError) as error:
        _made(kind, {"class_path": f"minirec_pl.{CLASSES[kind]}", "init_args": {option: value}})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "selection.selector=wrong.NoEpoch",
            "selection.selector: wrong.NoEpoch.select(self, signals, k) does not take",
        ),
        (
            "selection.curriculum=wrong.NoPlan",
            "selection.curriculum: wrong.NoPlan has no method plan: define `plan(self",
        ),
        (
            "model.policy=wrong.Half",
            "model.policy: wrong.Half has no method completion_pass, item_logps, roll_out, roll",
        ),
        ("model.rewards=[absent.any]", "model.rewards: there is no module absent, which 'absent.any' is to be taken"),
    ],
)
def test_a_fit_says_so_before_it_makes_a_folder(command, wrong, capsys, option, words):
    assert main(command.grpo(wrong / "runs", f"--{option}")) == 2
    assert words in sentence(capsys)
    assert not (wrong / "runs").exists()


def test_a_selector_of_another_command_is_told_the_same(wrong, capsys):
    (wrong / "none.parquet").touch()
    for name, words in [("NoSelect", "has no method select"), ("Needs", "Needs.needs is {'loss'}: give a frozenset")]:
        assert main(["select", "none.parquet", "--selector", f"wrong.{name}"]) == 2
        assert words in sentence(capsys)


def test_a_policy_of_ones_own_has_no_language_model_to_export(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    to = ["--to", str(tmp_path / "exported")]
    assert main(["export", str(run / "policy"), *to]) == 2
    assert "there is no policy in " in sentence(capsys)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["export", str(run / "policy"), *to]) == 2
    assert "is a my_policy.BagOfItems, which has no language model to export: load it with" in sentence(capsys)
    assert not (tmp_path / "exported").exists()
