"""Each warning about a selection, in each kind of run: every remedy that it names is applied, runs and helps."""

import json
import re
import warnings
from ast import literal_eval
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.rival_pool import random_pool
from helpers.slow import slow
from helpers.text_policy import text_policy, write_model
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import MiniRec, SelectSamples
from minirec_pl.cli.main import main
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import (
    MiniRecSelector,
    RandomSelector,
    RewardVarianceSelector,
    SampleSignals,
    Signals,
    SignalStore,
)
from minirec_pl.selection.session.session import session_of

N, GROUP, WIDTH = 60, 8, 60
LARGE = 1e3
pytestmark = pytest.mark.filterwarnings("ignore")


class Tables:
    """What is measured of each of 60 samples; `reward` [N, G], `gradient` [N, D] or None, `embedding` [N, E]."""

    def __init__(self, fault, better=()):
        random = np.random.default_rng(0)
        chance = np.where(np.arange(N) < 2, 0.5, random.uniform(0, 0.04, N))
        self.gradient, self.embedding = random.normal(size=(N, 5)), random.normal(size=(N, WIDTH))
        if fault == "equal rewards" and "rewards" not in better:
            chance = np.full(N, 0.5)
        if fault == "one difficulty apart":
            chance = np.where(np.arange(N) < 2, 0.5, 0.0)
        if fault == "no gradients" and "gradient" not in better:
            self.gradient = None
        if fault == "alike":
            best = np.arange(N) < 12
            chance = np.where(best, 0.5, np.linspace(0.2, 0.4, N))
            self.embedding = np.where(best[:, None], 1.0, np.eye(N, WIDTH))
        self.chance = chance
        self.rewards = np.repeat(chance[:, None], GROUP, axis=1)  # graded rewards whose mean is the chance
        if fault not in ("equal rewards", "alike"):
            self.rewards[:30, 0] = np.minimum(1.0, 0.6 + self.rewards[:30, 0])  # one rollout of half of them hits
            self.rewards[:, 1:] *= 0.2

    def of(self, rows, *, exact=False, group=GROUP):
        def row(values):
            return None if values is None else torch.as_tensor(values[rows], dtype=torch.float32)

        found = SampleSignals(torch.as_tensor(rows), row(self.rewards[:, :group]), row(self.gradient))
        return replace(found, embedding=row(self.embedding), solve_probability=row(self.chance) if exact else None)


class Own(LightningModule):
    """A user's module; the classifier's first output is the reward that the tables say."""

    def __init__(self, tables=None):
        super().__init__()
        self.classifier = torch.nn.Linear(WIDTH + 1, 3)
        torch.nn.init.zeros_(self.classifier.weight)
        torch.nn.init.zeros_(self.classifier.bias)
        with torch.no_grad():
            self.classifier.weight[0, -1] = LARGE
        self.tables = tables

    def forward(self, x):
        return self.classifier(x)

    def training_step(self, batch, batch_idx):
        return 0.0 * cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnSignals(Own):
    def sample_signals(self, batch):
        return self.tables.of(batch[2].numpy())


def own_loader(tables):
    reward = torch.as_tensor(tables.rewards.mean(axis=1, keepdims=True) / LARGE)
    x = torch.cat([torch.as_tensor(tables.embedding), reward], dim=1).float()
    return DataLoader(TensorDataset(x, torch.arange(N) % 3, torch.arange(N)), batch_size=10)


def head_reward(z, target):
    return z[:, 0]


class Crafted(GRPORecModule):
    """GRPO whose scores are those of the tables."""

    tables: Tables

    def sample_signals(self, batch, **options):
        found = super().sample_signals(batch, **options)
        made = self.tables.of(batch["sample_id"].numpy() % N, exact=found.solve_probability is not None)
        rewards = made.rewards[:, : self.scoring_generations]
        return replace(
            found,
            rewards=rewards,
            gradient=made.gradient,
            embedding=made.embedding,
            solve_probability=made.solve_probability,
        )


class Case:
    """A run of one kind, with a fault; `run` repeats it with changes and returns what it warned of and its picks."""

    def __init__(self, kind, fault, selector, budget, folder, request):
        self.kind, self.fault, self.selector, self.budget = kind, fault, selector, budget
        self.folder, self.request = folder, request

    def run(self, **changes):
        better = changes.pop("better", ())
        budget = changes.pop("budget", self.budget)
        return getattr(self, f"_{self.kind}")(Tables(self.fault, better), better, budget, changes)

    def _selector(self, changes):
        names = {name: value for name, value in changes.items() if name not in ("scoring_generations", "warmup_epochs")}
        return MiniRecSelector(**{**self.selector, **names})

    def _foreign(self, module, tables, probe, budget, changes):
        warm = changes.get("warmup_epochs", 0)
        minirec = MiniRec(
            budget, selector=self._selector(changes), probe=probe, rescore_fraction=1.0, warmup_epochs=warm
        )
        return self.fit_with(minirec, module, own_loader(tables))

    def fit_with(self, callback, module, loader=None, **data):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
            quiet |= {"limit_train_batches": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": "cpu"}
            trainer = Trainer(default_root_dir=self.folder, enable_checkpointing=False, callbacks=[callback], **quiet)
            trainer.fit(module, loader, **data)
        return [str(one.message).removeprefix("selection: ") for one in caught if one.category is UserWarning]

    def _head(self, tables, better, budget, changes):
        signals = ["reward", "embedding"] + ["gradient"] * (self.fault != "no gradients" or "gradient" in better)
        probe = HeadProbe("classifier", reward=head_reward, signals=signals)
        return self._foreign(Own(), tables, probe, budget, changes)

    def _probe(self, tables, better, budget, changes):
        def probe(module, batch, sample_id, **options):
            return tables.of(sample_id.numpy())

        return self._foreign(Own(), tables, probe, budget, changes)

    def _module(self, tables, better, budget, changes):
        return self._foreign(OwnSignals(tables), tables, None, budget, changes)

    def _grpo(self, policy, data, tables, budget, changes):
        module = Crafted(policy, num_generations=4, scoring_generations=changes.get("scoring_generations", 4))
        module.tables = tables
        warm = changes.get("warmup_epochs", 0)
        share = budget / N / (2 if self.fault == "alike" else 1)  # the pool holds each row several times
        minirec = MiniRec(share, selector=self._selector(changes), rescore_fraction=1.0, warmup_epochs=warm)
        return self.fit_with(minirec, module, datamodule=data)

    def _generator(self, tables, better, budget, changes):
        data = self.request.getfixturevalue("toy_data")()
        return self._grpo(self.request.getfixturevalue("tiny_policy")(), data, tables, budget, changes)

    def _retriever(self, tables, better, budget, changes):
        data = self.request.getfixturevalue("toy_data")(history_window=3)
        data.setup("fit")
        if not (self.folder / "model").is_dir():
            write_model(self.folder / "model")
        policy = text_policy(self.folder / "model", lora=False, catalogue=data.catalogue)
        return self._grpo(policy, data, tables, budget, changes)

    def _ledger(self, tables, better, budget, changes):
        path = self.folder / "ledger.parquet"
        store = SignalStore(range(N))
        store.update(tables.of(np.arange(N)), epoch=0, step=0, source="score")
        self._selector(changes).select(store.pool_view(0), budget).to_parquet(path)
        return self.fit_with(SelectSamples(ledger=str(path)), Own(), own_loader(tables))

    def _command(self, file, budget, flags):
        to = self.folder / "out"
        options = {"budget": budget, **{f"selector.{name}": _flag(value) for name, value in self.selector.items()}}
        words = [f"--{name}={value}" for name, value in options.items()]
        assert main(["select", *map(str, file), *words, *flags, "--to", str(to)]) == 0
        return json.loads((to / "diagnostics.json").read_text())["warnings"]

    def _store(self, tables, better, budget, changes):
        store = SignalStore(range(N))
        store.update(tables.of(np.arange(N)), epoch=0, step=0, source="score")
        return self._command([store.save(self.folder / "s.safetensors")], budget, changes.get("flags", []))

    def _table(self, tables, better, budget, changes):
        table = pd.DataFrame({"sample_id": range(N), "rewards": tables.rewards.tolist()})
        table.to_parquet(self.folder / "s.parquet")
        np.save(self.folder / "e.npy", tables.embedding.astype("float32"))
        vectors = ["--embeddings", self.folder / "e.npy"]
        if tables.gradient is not None:
            np.save(self.folder / "g.npy", tables.gradient.astype("float32"))
            vectors += ["--gradients", self.folder / "g.npy"]
        return self._command([self.folder / "s.parquet", *vectors], budget, changes.get("flags", []))


def _flag(value):
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value


PHRASES = {
    "give HeadProbe another `reward`": {"better": ["rewards"]},
    "let the probe return rewards that differ": {"better": ["rewards"]},
    "let sample_signals return rewards that differ": {"better": ["rewards"]},
    "put gradient among the `signals` of HeadProbe": {"better": ["gradient"]},
    "let the probe return `gradient`": {"better": ["gradient"]},
    "return `gradient` from sample_signals": {"better": ["gradient"]},
    "give --gradients": {"better": ["gradient"]},
    "raise the budget": {"budget": 50},
    "give a larger --budget": {"budget": 50},
    "make it with a larger budget": {"budget": 50},
    "set scoring_generations=8 on the module": {"scoring_generations": 8},
    "set warmup_epochs to train before selecting": {"warmup_epochs": 1},
}


def remedies(text):
    """The changes that a warning advises, each the options of a run, read off its words."""
    advice = text.partition(": ")[2]
    found = []
    for part in advice.split(", or "):
        if part in PHRASES:
            found.append(dict(PHRASES[part]))
            continue
        words = part
        for around in ("select again with ", "make the ledger again with ", "set ", " on MiniRecSelector"):
            words = words.replace(around, "")
        if words.startswith("--selector."):
            found.append({"flags": words.split()})
            continue
        named = re.findall(r"(\w+)=(\([^)]*\)|'[^']*'|[\w.-]+)", words)
        assert " and ".join(f"{name}={value}" for name, value in named) == words, part
        found.append({name: literal_eval(value) for name, value in named})
    return found


OPEN = {"gate": (-1.0, 2.0)}
CASES = {
    "sparse": ("learnability is below 0.05 for ", OPEN | {"mu": 0.9, "sigma": 0.1}, 10),
    "one difficulty apart": ("learnability is below 0.05 for ", OPEN | {"mode": "official", "gradient": "first"}, 10),
    "equal rewards": ("learnability is the same for all samples", OPEN, 10),
    "no gradients": ("representativeness is the same for all samples", OPEN, 10),
    "hard": (" of the picks have a ", OPEN | {"mode": "official", "gradient": "first"}, 45),
    "filled": (" of the picks have a ", {"gate": (0.1, 0.95), "on_short": "fill"}, 50),
    "alike": ("novelty decides ", OPEN | {"beta": 0.0}, 12),
}
KINDS = ["head", "module", "ledger", "store", *map(slow, ("probe", "table", "generator", "retriever"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", CASES)
def test_every_remedy_of_a_warning_works_in_its_kind_of_run(kind, fault, tmp_path, request):
    sign, selector, budget = CASES[fault]
    case = Case(kind, fault, selector, budget, tmp_path, request)
    said = [text for text in case.run() if sign in text]
    assert len(said) == 1, "shown once in two epochs, each with a selection of its own"
    advised = remedies(said[0])
    assert advised
    for change in advised:
        assert not any(name in selector and selector[name] == value for name, value in change.items()), "in force"
        again = [text for text in case.run(**change) if sign in text]
        assert again != said, change


@pytest.mark.parametrize("kind", ["rewards", "chances"])
@pytest.mark.parametrize(
    ("options", "unknown", "advised"),
    [
        ({}, 0, ["lower the budget to 20", "widen the gate", "set on_short='fill'"]),
        ({}, 5, ["lower the budget to 20", "score more samples", "widen the gate", "set on_short='fill'"]),
        ({"on_short": "fill"}, 5, ["lower the budget to 55", "score more samples"]),
        ({"mode": "official"}, 5, ["lower the budget to 55", "score more samples"]),
    ],
)
def test_a_short_pick_advises_what_gives_more(kind, options, unknown, advised):
    difficulty = np.where(np.arange(N) < 20, 0.5, 0.0)
    known = np.where(np.arange(N) < N - unknown, difficulty, np.nan)

    def signals(values):
        count = np.isfinite(values).astype(int)
        chances = {"solve_probability": values} if kind == "chances" else {"solve_share": values}
        vectors = {"embedding": np.random.default_rng(0).normal(size=(N, 3)), "gradient": np.eye(N)}
        return Signals(np.arange(N), values, values * 0, count, **chances, **vectors)

    selector = {"difficulty": "pass_at_group", "num_generations": 1} if kind == "chances" else {}
    with pytest.warns(UserWarning, match="samples instead of 60") as caught:
        first = MiniRecSelector(**selector, **options).select(signals(known), N)
    (text,) = [str(one.message) for one in caught]
    assert text.partition(": ")[2].split(", or ") == advised
    picked = first.n_selected
    changes = {
        "widen the gate": {"gate": (-1.0, 2.0)},
        "set on_short='fill'": {"on_short": "fill"},
        "score more samples": {},
    }
    for advice in advised:
        if advice.startswith("lower the budget"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                MiniRecSelector(**selector, **options).select(signals(known), picked)
            continue
        more = signals(np.where(np.isnan(known), 0.5, known) if advice == "score more samples" else known)
        found = MiniRecSelector(**{**selector, **options, **changes[advice]}).select(more, N)
        assert found.n_selected > picked, advice


def test_a_gate_that_nothing_passes_names_what_would():
    signals = random_pool(reward_mean=np.linspace(0.01, 0.04, N))
    with pytest.raises(InputError, match=r"widen the gate, since they are 0\.01 to 0\.04, or set on_short='fill'$"):
        MiniRecSelector().select(signals, 5)
    for change in ({"gate": (0.01, 0.04)}, {"on_short": "fill"}):
        assert MiniRecSelector(**change).select(signals, 5).n_selected == 5


@pytest.mark.parametrize("group", [1, 8])
def test_groups_without_variance_advise_rollouts_only_where_there_are_groups(group):
    flat = {"reward_std": np.zeros(N), "n_rollouts": np.full(N, group)}
    with pytest.raises(InputError, match=r"no sample can be picked") as caught:
        RewardVarianceSelector().select(random_pool(**flat), 5)
    assert ("draw more rollouts" in str(caught.value)) == (group > 1)
    assert ("another selector" in str(caught.value)) == (group == 1)


def test_exact_probabilities_without_rewards_are_enough_for_what_is_advised():
    unknown = np.full(N, np.nan)
    none = {"reward_mean": unknown, "reward_std": unknown, "n_rollouts": np.zeros(N, dtype=int), "solve_share": None}
    signals = random_pool(**none, solve_probability=np.linspace(0, 0.5, N))
    with pytest.raises(InputError, match=r"set difficulty='pass_at_group', for which") as caught:
        MiniRecSelector().select(signals, 5)
    assert "scoring_generations of at least 2" in str(caught.value)
    assert MiniRecSelector(difficulty="pass_at_group").select(signals, 5).n_selected == 5


class Talkative(RandomSelector):
    """Warns at every selection, each time with another number."""

    def select(self, signals, k, *, epoch=0):
        warnings.warn(f"picked {epoch + 3} samples of {len(signals)}", stacklevel=2)
        return super().select(signals, k, epoch=epoch)


def said_in(trainer, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(*args, **options)
    return [str(one.message) for one in caught if one.category is UserWarning]


def test_a_warning_is_shown_once_a_run_also_when_it_is_resumed(make_trainer, tmp_path):
    loader = own_loader(Tables("sparse"))
    path = tmp_path / "epoch.ckpt"

    def make(epochs):
        return make_trainer(
            max_epochs=epochs, callbacks=[MiniRec(0.2, selector=Talkative(redraw=True), curriculum="shuffled")]
        )

    trainer = make(3)
    assert sum("samples of 60" in text for text in said_in(trainer, Own(), loader)) == 1
    trainer.save_checkpoint(path)
    assert sum("samples of 60" in text for text in said_in(make(6), Own(), loader, ckpt_path=path)) == 0
    assert sum("samples of 60" in text for text in said_in(make(1), Own(), loader)) == 1


def test_only_the_first_rank_warns(make_trainer, monkeypatch):
    trainer = make_trainer()
    session = session_of(trainer)
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda _: False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.warn_once(trainer, "said", "said")
    assert session.told == ["said"]


def test_overfit_batches_and_what_it_advises(make_trainer):
    loader = own_loader(Tables("sparse"))
    minirec = MiniRec(0.5, selector=RandomSelector(), curriculum="shuffled")
    trainer = make_trainer(overfit_batches=1, callbacks=[minirec])
    assert sum("use limit_train_batches" in text for text in said_in(trainer, Own(), loader)) == 1
    trainer = make_trainer(
        limit_train_batches=1, callbacks=[MiniRec(0.5, selector=RandomSelector(), curriculum="shuffled")]
    )
    assert not any("overfit_batches" in text for text in said_in(trainer, Own(), loader))
    assert len(session_of(trainer).selected) == N // 2


def only_hits(completions, target, **_):
    """A reward that applies to nothing but hits."""
    return [1.0 if one == wanted else None for one, wanted in zip(completions, target, strict=True)]


def test_completions_without_a_reward_are_said_once_a_run(toy_data, tiny_policy, make_trainer):
    module = GRPORecModule(tiny_policy(), rewards=[only_hits], num_generations=2)
    said = said_in(make_trainer(limit_train_batches=3), module, datamodule=toy_data())
    assert sum("they are left out" in text for text in said) == 1
