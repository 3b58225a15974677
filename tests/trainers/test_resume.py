"""Runs without a selection: a checkpoint taken anywhere resumes bit for bit as the run that was never stopped."""

import contextlib
import random

import numpy as np
import pytest
import torch
from helpers.slow import slow
from helpers.text_policy import write_model
from helpers.tiny_config import TINY
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, RecDataModule, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.data.loader import ResumableLoader
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora, PromptTemplate, RetrievalPolicy
from minirec_pl.selection import RandomSelector
from minirec_pl.selection.session.resume import RUNNING_KEY

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 7  # an epoch; two of them, with two batches to an optimizer step, the last one with one


class OutOfLuck(Exception):
    pass


class SaveAt(Callback):
    """Saves at one visit of a hook; then, if asked to, fails there."""

    def __init__(self, path, hook, visit, fail):
        self.path, self.hook, self.visit, self.fail, self.visits, self.broken = path, hook, visit, fail, 0, False
        setattr(self, hook, self._pass)

    def _pass(self, trainer, pl_module, *_):
        self.visits += 1
        if self.visits == self.visit:
            if self.fail:
                raise OutOfLuck
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, OutOfLuck):
            trainer.save_checkpoint(self.path)


class Noise(Callback):
    """What ends a run depends on Python's and NumPy's numbers too."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(random.random() + np.random.random())


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def scheduler(made):
    return torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))


def generative(kind):
    config = {**TINY, "attention_dropout": 0.3}
    if kind == "warm":
        return WarmStartModule(GenerativePolicy(config=config), 0.2, optimizer, scheduler)
    return GRPORecModule(
        GenerativePolicy(config=config),
        num_generations=4,
        num_iterations=2 if kind == "iterations" else 1,
        steps_per_generation=4 if kind == "generations" else None,
        rollouts="expected" if kind == "expected" else "sample",
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def retrieval(folder, kind):
    model = LanguageModel(str(folder), dtype="float32", lora=Lora(r=2, alpha=4, dropout=0.3))
    policy = RetrievalPolicy(
        model,
        prompt=PromptTemplate(system="", user="{history}", age=""),
        max_completion_length=2,
        similarity_temperature=0.1,
        cached_negatives=3,
        refresh_items_every_n_steps=3,
    )
    if kind == "warm":
        return WarmStartModule(policy, optimizer=optimizer, lr_scheduler=scheduler)
    return GRPORecModule(policy, num_generations=3, optimizer=optimizer, lr_scheduler=scheduler)


class PersistentData(RecDataModule):
    """Workers that stay, and seeds drawn from torch's global generator."""

    persistent = 2

    def train_dataloader(self):
        made = super().train_dataloader()
        loader = ResumableLoader(
            made.dataset,
            batch_size=made.batch_size,
            sampler=made.sampler,
            collate_fn=made.collate_fn,
            num_workers=self.persistent,
            persistent_workers=self.persistent > 0,
        )
        for name in ("steps", "iterations", "progress", "batches_per_epoch"):
            setattr(loader, name, getattr(made, name))
        return loader


class DrawingData(PersistentData):
    """No workers, and seeds drawn from torch's global generator all the same."""

    persistent = 0


@pytest.fixture
def compare(tmp_path, toy_path, make_trainer):
    """Asserts that a run resumed from the given place equals one that was never stopped."""

    def run(make, place, fail=False, *, whole, kind=RecDataModule, data=None, seed=0, extra=(), **options):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        module = make()
        saver = SaveAt(tmp_path / "saved.ckpt", *place, fail)
        resumes = not whole and not fail
        trainer = make_trainer(
            callbacks=[Noise(), *extra] + ([] if resumes else [saver]),
            limit_train_batches=BATCHES,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            limit_val_batches=1,
            **{"val_check_interval": 3, **options},
        )
        source = kind(str(toy_path), "toy", **{"warm_fraction": 0.5, "batch_size": 4, "seed": 1, **(data or {})})
        path = str(saver.path) if resumes else None
        with pytest.raises(OutOfLuck) if fail else contextlib.nullcontext():
            trainer.fit(module, source, ckpt_path=path)
        if fail:
            return None
        ends = {name: value.clone() for name, value in module.state_dict().items()}
        moments = trainer.optimizers[0].state_dict()["state"]
        ends |= {f"{n} {name}": value for n, state in moments.items() for name, value in state.items()}
        numbers = torch.get_rng_state(), random.random(), float(np.random.random()), module.cost.rollouts
        return ends, trainer.optimizers[0].param_groups[0]["lr"], numbers

    def check(make, place, fail=False, **options):
        extra = options.pop("extra", tuple)
        hook, _ = place
        whole = run(make, place if not fail else (hook, -1), whole=True, extra=extra(), **options)
        if fail:
            run(make, place, True, whole=False, extra=extra(), **options)
        stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        resumed = run(make, place, whole=False, seed=9, extra=extra(), **options)
        assert whole[0].keys() == resumed[0].keys()
        assert [n for n, value in whole[0].items() if not torch.equal(value, resumed[0][n])] == []
        assert resumed[1] == whole[1]
        assert torch.equal(resumed[2][0], whole[2][0])
        assert resumed[2][1:3] == whole[2][1:3]
        assert fail or resumed[2][3] == whole[2][3]
        return stored

    return check


PLACES = [  # batches 3 and 6 are followed by a validation; 8, 10 and 13 are inside accumulations
    ("on_train_batch_end", 1),
    ("on_train_batch_end", 3),
    ("on_train_batch_end", 4),
    ("on_train_batch_end", 7),
    ("on_train_batch_end", 10),
    ("on_validation_end", 1),
    ("on_validation_batch_end", 1),
    ("on_validation_end", 3),
    ("on_train_epoch_end", 1),
]


@pytest.mark.parametrize("kind", ["grpo", "expected"])
@pytest.mark.parametrize("place", PLACES)
def test_places_without_a_selection(compare, place, kind):
    compare(lambda: generative(kind), place)


@pytest.mark.parametrize(
    ("hook", "visit"),
    [
        ("on_train_batch_start", 2),
        slow("on_before_backward", 4),
        slow("on_after_backward", 1),
        ("on_after_backward", 2),
        slow("on_after_backward", 9),
        slow("on_before_optimizer_step", 2),
        ("on_validation_batch_end", 2),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "warm", "expected"])
def test_a_batch_that_is_broken_off_is_trained_on_once(compare, kind, hook, visit):
    data = {"train_on": "warm", "warm_batch_size": 1} if kind == "warm" else {}
    compare(lambda: generative(kind), (hook, visit), True, data=data)


@pytest.mark.parametrize(
    "place", [("on_train_batch_end", 3), slow(("on_train_batch_end", 9)), ("on_train_epoch_end", 1)]
)
@pytest.mark.parametrize("kind", ["warm", "iterations", "generations"])
def test_other_modules(compare, kind, place):
    data = {"train_on": "warm", "warm_batch_size": 1} if kind == "warm" else {}
    compare(lambda: generative(kind), place, data=data)


@pytest.mark.slow
@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize(
    ("place", "fail"),
    [
        (("on_train_batch_end", 3), False),  # the validation left out would have encoded the items anew
        (("on_validation_end", 1), False),
        (("on_train_batch_end", 8), False),
        (("on_after_backward", 4), True),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "warm"])
def test_a_retrieval_policy(compare, folder, kind, place, fail, selection):
    def callbacks():
        return [MiniRec(48, selector=RandomSelector(), curriculum="shuffled")] if selection else []

    data = (
        {"train_on": "warm_samples", "batch_size": 3, "history_window": 2}
        if kind == "warm"
        else {"batch_size": 3, "history_window": 2}
    )
    compare(lambda: retrieval(folder, kind), place, fail, data=data, extra=callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("place", [("on_train_batch_end", 3), ("on_train_batch_end", 9), ("on_train_epoch_end", 1)])
@pytest.mark.parametrize("kind", [RecDataModule, PersistentData, DrawingData])
def test_workers(compare, kind, place):
    data = {"num_workers": 2}
    compare(lambda: generative("grpo"), place, kind=kind, data=data, reload_dataloaders_every_n_epochs=0)


class EachRank(Callback):
    """Gives each rank and run numbers of its own, and keeps how it ended."""

    def __init__(self, folder, run):
        self.folder, self.run = folder, run

    def on_fit_start(self, trainer, pl_module):
        seed = 10 * self.run + trainer.global_rank
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)

    def on_train_end(self, trainer, pl_module):
        numbers = torch.get_rng_state(), random.random(), float(np.random.random())
        state = {"weights": pl_module.state_dict(), "numbers": numbers}
        torch.save(state, self.folder / f"{self.run}-{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("place", [("on_train_batch_end", 3), ("on_train_batch_end", 4)])
def test_ranks(tmp_path, toy_path, make_trainer, place):
    ends = []
    for run in range(2):
        torch.manual_seed(0)
        saver = [] if run else [SaveAt(tmp_path / "saved.ckpt", *place, False)]
        trainer = make_trainer(
            devices=2,
            strategy="ddp_fork",
            callbacks=[EachRank(tmp_path, run), *saver],
            limit_train_batches=5,
            accumulate_grad_batches=2,
            limit_val_batches=1,
            val_check_interval=3,
        )
        data = RecDataModule(str(toy_path), "toy", warm_fraction=0.5, batch_size=4, seed=1)
        trainer.fit(generative("grpo"), data, ckpt_path=tmp_path / "saved.ckpt" if run else None)
        ends.append([torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True) for rank in range(2)])
    ranks = torch.load(tmp_path / "saved.ckpt", weights_only=True)[RUNNING_KEY]
    assert [bool(rank["gradients"]) for rank in ranks] == [place[1] % 2 == 1] * 2
    assert not torch.equal(ranks[0]["random"]["torch"], ranks[1]["random"]["torch"])
    for whole, resumed in zip(*ends, strict=True):
        assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
        assert torch.equal(whole["numbers"][0], resumed["numbers"][0])
        assert whole["numbers"][1:] == resumed["numbers"][1:]


@pytest.mark.slow
def test_frozen_weights_have_no_gradients_and_weights_alone_no_state(compare, folder, tmp_path, toy_path, make_trainer):
    stored = compare(
        lambda: retrieval(folder, "grpo"), ("on_train_batch_end", 3), data={"batch_size": 3, "history_window": 2}
    )
    (rank,) = stored[RUNNING_KEY]
    assert rank["gradients"]
    assert all("lora_" in name for name in rank["gradients"])
    trainer = make_trainer(max_epochs=-1, max_steps=1)
    trainer.fit(generative("grpo"), RecDataModule(str(toy_path), "toy", warm_fraction=0.5))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert RUNNING_KEY not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
