"""Every cell of the table in docs/identity.md: what an artifact was made for changes, and that is refused or listed."""

import shutil
import warnings

import pytest
import torch
import yaml
from helpers import identity_world as world_of
from helpers.compare_tools import BASE as STUDY_CONFIG
from helpers.identity_world import IDS, IN_WORDS, OPTIONS, TEST, WEIGHTS, Log, World, documented
from helpers.paths import REPOSITORY
from lightning.pytorch import Trainer

from minirec_pl.callbacks import SelectSamples
from minirec_pl.cli import score
from minirec_pl.cli.compare import running, tasks
from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.main import main
from minirec_pl.cli.score import ScoringTrainer
from minirec_pl.policy import GenerativePolicy, PromptTemplate
from minirec_pl.reporting.sections import _of_other_data
from minirec_pl.selection import RandomSelector
from minirec_pl.selection.signal_sources import read_signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.identity import figures_fact

PAGE = REPOSITORY / "docs" / "identity.md"
CELLS = documented(PAGE, "# What goes with what")
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_predict_batches": 1,
    "check_val_every_n_epoch": 99,
}
TOLD = (
    "was trained on other data",
    "goes on with",
    "was made for other samples to choose from",
    "resumes with changed options",
    "not resumed",
    "are of different data",
)


def trainer(folder, epochs=1, kind=Trainer, **options):
    return kind(default_root_dir=folder, max_epochs=epochs, **{**QUIET, **options})


class ResumedFit:
    def make(self, world, folder):
        self.path = folder / "fit.ckpt"
        made = trainer(folder)
        made.fit(world.module(), datamodule=world.data())
        made.save_checkpoint(self.path)

    def meet(self, world, folder):
        trainer(folder, epochs=2).fit(world.module(), datamodule=world.data(), ckpt_path=self.path)


class Evaluation(ResumedFit):
    def meet(self, world, folder):
        trainer(folder).validate(world.module(), datamodule=world.data(), ckpt_path=self.path, verbose=False)


class Signals:
    def make(self, world, folder):
        self.base = folder / "1"
        self.score(world, self.base, "1/2")
        if not world.words:
            self.weights = {n: p.clone() for n, p in self.policy.state_dict().items()}

    def score(self, world, to, shard):
        torch.manual_seed(3)
        module, data = world.module(), world.data()
        data.setup("fit")
        module.policy.bind(data.catalogue)
        self.policy = module.policy
        if world.changed == WEIGHTS:
            with torch.no_grad():
                next(module.policy.parameters()).add_(1)
        module.rollout_seed = 5
        trainer(to, kind=ScoringTrainer).score(module, data, str(to), shard)

    def meet(self, world, folder):
        self.score(world, folder, "2/2")
        read_signals([self.base / "signals.safetensors", folder / "signals.safetensors"])


class Ledger(Signals):
    def make(self, world, folder):
        super().make(world, folder)
        self.score(world, folder / "whole", "1/1")
        found = read_signals([folder / "whole" / "signals.safetensors"])
        ledger = RandomSelector().select(found.signals, 5)
        ledger.fingerprints = found.fingerprints
        self.path = ledger.to_parquet(folder / "ledger.parquet")

    def meet(self, world, folder):
        callbacks = [SelectSamples(None, ledger=str(self.path))]
        trainer(folder, callbacks=callbacks).fit(world.module(), datamodule=world.data())


class PolicyFolder:
    def make(self, world, folder):
        self.folder = folder / "policy"
        module = world.module()
        trainer(folder).fit(module, datamodule=world.data())
        module.policy.save_pretrained(self.folder)

    def meet(self, world, folder):
        shutil.copytree(self.folder, folder / "policy")
        options = {"prompt": PromptTemplate(system="Now!")} if world.changed == world_of.PROMPT else {}
        if world.changed == IDS:
            options["item_ids"] = "token"
        if world.changed == world_of.TOKENIZER:
            world_of.change_tokenizer(folder / "policy")
        policy = GenerativePolicy(pretrained=str(folder / "policy"), **options)
        trainer(folder).validate(world.module(policy), datamodule=world.data(), verbose=False)


class Predictions:
    def make(self, world, folder):
        self.folder = folder
        self.predict(world, folder)

    def predict(self, world, folder):
        torch.manual_seed(3)
        module = world.module()
        module.predict_k = 3 if world.changed == OPTIONS else 2
        if world.changed == WEIGHTS:
            torch.manual_seed(4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score, "merge_parts", lambda requests, path: None)  # as where the run was interrupted
            made = trainer(folder, kind=ScoringTrainer)
            made.predict(model=module, datamodule=world.data(), to=str(folder / "top.parquet"))

    def meet(self, world, folder):
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        self.predict(world, folder)


class StudyFolder:
    """A warm start and a cell of one seed; later the cell is looked at again, and another seed is begun."""

    def make(self, world, folder):
        self.to = folder / "to"
        study = self.study(world, folder)
        self.cell = study.cells()[0]
        tasks.warm_start(study, self.cell.data, 1, self.to)
        tasks.run_cell(study, self.cell, self.to)

    def study(self, world, folder):
        policy = STUDY_CONFIG["model"]["init_args"]["policy"]
        if world.words:
            model = {"name": str(world.folder / "lm"), "dtype": "float32"}
            kind = "token" if world.changed == IDS else "title"
            prompt = {"system": "Now!" if world.changed == world_of.PROMPT else "", "user": "{history}\nNext?"}
            options = {"language_model": model, "item_ids": kind, "prompt": prompt}
            policy = {"class_path": "minirec_pl.policy.GenerativePolicy", "init_args": options}
        rewards = ["minirec_pl.rewards.hit"]
        if world.changed == world_of.REWARDS:
            rewards = [{"class_path": "minirec_pl.rewards.NDCGReward"}]
        model = {**STUDY_CONFIG["model"]["init_args"], "policy": policy, "rewards": rewards, "num_generations": 2}
        model["temperature"] = 0.5 if world.changed == OPTIONS else 1.0
        data = {"source": {"class_path": "helpers.identity_world.Log"}, "warm_fraction": 0.5, "batch_size": 8}
        data |= {"history_window": 5, "pool_samples": 16} | world_of.OF_DATA.get(world.changed, {})
        data |= {name: list(value) for name, value in data.items() if isinstance(value, tuple)}
        warm = {"train_on": "warm_samples", "samples": 8, "epochs": 1, "batch_size": 8}
        config = {
            **STUDY_CONFIG,
            "warm_start": warm,
            "selection": None,
            "model": {"class_path": "minirec_pl.GRPORecModule", "init_args": model},
            "data": {"class_path": "minirec_pl.RecDataModule", "init_args": data},
        }
        text = {
            "config": str(folder / "fit.yaml"),
            "datasets": [{"name": "log"}],
            "seeds": [1, 2],
            "methods": {"full": {"overrides": {"selection": None}}},
        }
        (folder / "fit.yaml").write_text(yaml.safe_dump(config))
        (folder / "study.yaml").write_text(yaml.safe_dump(text))
        return Study.read(folder / "study.yaml")

    def meet(self, world, folder):
        shutil.copytree(self.to, folder / "to")
        study = self.study(world, folder)
        running._finished(study, study.cells()[0], folder / "to")
        tasks.warm_start(study, study.cells()[0].data, 2, folder / "to")


class Report:
    def make(self, world, folder):
        self.rows = self.of(world, "before")

    def of(self, world, label):
        data = world.data()
        data.setup("fit")
        facts = data.identity.facts
        parts = ("validation", "test")
        return [{"part": part, "label": label, "data": figures_fact(facts, f"{part}_part")} for part in parts]

    def meet(self, world, folder):
        print(*_of_other_data([*self.rows, *self.of(world, "after")]))


KINDS = {
    "resumed fit": ResumedFit,
    "evaluation": Evaluation,
    "signals": Signals,
    "ledger": Ledger,
    "policy": PolicyFolder,
    "predictions": Predictions,
    "study": StudyFolder,
    "report": Report,
}
BY_COMMAND = {  # what the command alone says of a resumed fit
    TEST: ["--data.test_samples=4"],
    OPTIONS: ["--selection.budget=0.3", "--model.optimizer.lr=0.5"],
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Makes each artifact once, in a world of its own."""
    made = {}

    def get(kind, words, sequences):
        if (kind, words, sequences) not in made:
            folder = tmp_path_factory.mktemp("made")
            Log.changed, Log.sequences = "", sequences
            world, artifact = World(folder / "world", words), KINDS[kind]()
            (folder / "own").mkdir()
            artifact.make(world, folder / "own")
            made[kind, words, sequences] = world, artifact
        return made[kind, words, sequences]

    yield get
    Log.changed, Log.sequences = "", False


def outcome(act, capsys):
    """Whether it was refused, or what was said of a change."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except InputError as error:
            return "refused", str(error)
    said = " ".join([capsys.readouterr().out, *(str(warning.message) for warning in caught)])
    return ("listed" if any(words in said for words in TOLD) else "-"), said


def test_the_table_has_all_artifacts_and_only_known_words():
    assert {column for _, column in CELLS} == set(KINDS)
    assert set(CELLS.values()) == {"refused", "listed", "-"}
    things = {value for name, value in vars(world_of).items() if name.isupper() and isinstance(value, str)}
    assert {row for row, _ in CELLS} == things


NAMED = {  # one of these words is said of a change, whatever it is made for
    world_of.TARGET: ["target"],
    world_of.USER: ["user"],
    world_of.TIME: ["time"],
    world_of.RATING: ["rating"],
    world_of.HISTORY: ["history"],
    world_of.ORDER: ["item 1 of the catalogue", "item 1 is", "row 1 of the catalogue"],
    world_of.TEXT: ["the item 'i3' has another title", "row 3 of the texts has another title"],
    world_of.SPLIT: ["the split is [0.8, 0.15, 0.05]"],
    world_of.POOL: ["the training part is the pool"],
    world_of.VALIDATION: ["the validation part is"],
    TEST: ["the requests are 2 samples"],
    world_of.WINDOW: ["the history window is 3 here and 5 there"],
    world_of.PROMPT: ["prompt"],
    world_of.TOKENIZER: ["tokenizer"],
    IDS: ["item ids are", "item_ids 'title'"],
    world_of.BASE: ["base model", "the model under its adapters"],
    world_of.REWARDS: ["the rewards are NDCGReward"],
    WEIGHTS: ["another model", "the weights differ"],
    OPTIONS: ["the scoring is", "the setting.predict k is 3 here and 2 there"],
}
CASES = [
    pytest.param(row, column, marks=[pytest.mark.slow] if row in IN_WORDS or column == "study" else [])
    for row, column in CELLS
    if not (column == "resumed fit" and row in BY_COMMAND)
]


@pytest.mark.parametrize(("row", "column"), CASES)
def test_a_cell(row, column, artifacts, tmp_path, capsys):
    words, sequences = row in IN_WORDS, row == world_of.HISTORY
    world, artifact = artifacts(column, words, sequences)
    Log.sequences = sequences
    world.change(row)
    try:
        found, said = outcome(lambda: artifact.meet(world, tmp_path), capsys)
    finally:
        world.change("")
        if words:
            world_of.write_language_model(world.folder / "lm")
    assert found == CELLS[row, column], said
    assert found == "-" or column in ("report", "study") or any(text in said for text in NAMED[row]), said
    assert "\n" not in said or found != "refused"


@pytest.mark.parametrize("column", [pytest.param(c, marks=pytest.mark.slow) if c == "study" else c for c in KINDS])
def test_nothing_is_said_where_nothing_has_changed(column, artifacts, tmp_path, capsys):
    world, artifact = artifacts(column, False, False)
    Log.sequences = False
    found, said = outcome(lambda: artifact.meet(world, tmp_path), capsys)
    assert found == "-", said
    assert "cannot be checked" not in said


@pytest.fixture(scope="module")
def resumable(command):
    root = command.folder / "identity"
    assert main(command.grpo(root, "--trainer.max_epochs=1")) == 0
    return root / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("row", BY_COMMAND)
def test_a_resumed_command_lists_its_options(row, resumable, capsys):
    assert CELLS[row, "resumed fit"] == "listed"
    capsys.readouterr()
    root = f"--trainer.default_root_dir={resumable.parents[2] / row.replace(' ', '-')}"
    assert main(["fit", "--ckpt_path", str(resumable), root, "--trainer.max_epochs=2", *BY_COMMAND[row]]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumes with changed options")]
    assert "trainer.max_epochs 1 -> 2" in line
    if row == TEST:
        assert "data.init_args.test_samples null -> 4" in line
    else:
        options, _, idle = line.partition("; without effect, since ")
        assert "selection.init_args.budget 0.4 -> 0.3" in options
        assert idle.partition(": ")[2] == "model.init_args.optimizer.init_args.lr 0.0002 -> 0.5"
