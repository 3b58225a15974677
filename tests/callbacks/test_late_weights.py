"""Weights that a module sets after the pool was scored: the first selection is that of the weights that are trained."""

import pytest
import torch
from helpers.foreign import Classifier, Points, loader_of
from helpers.slow import slow
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec
from minirec_pl.cli.stages import _StartWeights
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")
AGAIN = "the pool was scored before the weights were set that are trained, so it is scored again"


@torch.no_grad()
def set_weights(module):
    """As RecTools does it: through `.data`, which leaves no trace in version counters."""
    generator = torch.Generator().manual_seed(77)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


class Late(Classifier):
    """Sets its weights in one of Lightning's hooks, and draws a random number there."""

    def __init__(self, hook, **options):
        super().__init__(**{"dropout": 0.3, **options})
        self.hook, self.probed = hook, 0
        if hook == "__init__":
            set_weights(self)

    def _set(self, hook):
        if hook == self.hook and not getattr(self, "resumed", False):
            set_weights(self)

    def setup(self, stage):
        self._set("setup")

    def on_fit_start(self):
        self._set("on_fit_start")

    def on_train_start(self):
        self._set("on_train_start")


class Counting(HeadProbe):
    def __call__(self, module, batch, sample_id, gradient="first"):
        module.probed += len(sample_id)
        return super().__call__(module, batch, sample_id, gradient)


class First(Callback):
    """Keeps the first ledger, plan and numbers, and how a rank ended."""

    def __init__(self, folder=None):
        self.folder, self.kept = folder, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kept is None:
            session = session_of(trainer)
            self.kept = (session.ledger.table, session.plan, torch.get_rng_state())

    def on_train_end(self, trainer, pl_module):
        if self.folder is not None:
            state = {"seen": pl_module.seen, "probed": pl_module.probed, "plan": self.kept[1]}
            torch.save({**state, "weights": pl_module.path[-1]}, self.folder / f"{trainer.global_rank}.pt")


def fit(make_trainer, hook, loader=None, first=None, **options):
    first = first or First()
    module = Late(hook)
    torch.manual_seed(5)
    callback = MiniRec(
        24,
        selector=MiniRecSelector(gate=(-1.0, 2.0)),
        rescore_fraction=0.5,
        probe=Counting("classifier"),
        curriculum=EasyToHardCurriculum(n_folds=1),
    )
    trainer = make_trainer(callbacks=[callback, first], **options)
    trainer.fit(module, loader or loader_of(shuffle=True), loader_of())
    return module, first


def assert_same(late, early):
    (module, first), (expected, of_expected) = late, early
    assert first.kept[0].equals(of_expected.kept[0])
    assert first.kept[1] == of_expected.kept[1]
    assert torch.equal(first.kept[2], of_expected.kept[2])
    assert module.seen == expected.seen
    assert torch.equal(module.path[-1], expected.path[-1])


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_sanity_val_steps": 1, "limit_val_batches": 1, "val_check_interval": 2}, {"limit_train_batches": 2}],
)
def test_the_first_selection_is_that_of_the_weights_that_are_trained(make_trainer, hook, options):
    with pytest.warns(UserWarning, match=AGAIN):
        late = fit(make_trainer, hook, **options)
    assert_same(late, fit(make_trainer, "__init__", **options))
    assert late[0].probed == 60 + 60 + 30


@pytest.mark.parametrize("hook", ["__init__", "setup"])
def test_weights_set_in_time_are_scored_once(make_trainer, hook, recwarn):
    module, _ = fit(make_trainer, hook)
    assert module.probed == 60 + 30
    assert not [warning for warning in recwarn if AGAIN in str(warning.message)]


@pytest.mark.parametrize(
    ("ours", "persistent", "reload"),
    [slow(False, False, 0), slow(False, True, 1), (True, False, 0), slow(True, True, 0)],
)
def test_with_workers(make_trainer, ours, persistent, reload):
    def loader():
        options = {"num_workers": 2, "persistent_workers": persistent}
        if ours:
            return DataLoader(Points(), batch_size=8, sampler=CurriculumSampler(range(60)), **options)
        return loader_of(shuffle=True, **options)

    options = {"reload_dataloaders_every_n_epochs": reload}
    late = fit(make_trainer, "on_train_start", loader(), **options)
    assert_same(late, fit(make_trainer, "__init__", loader(), **options))


def test_a_plan_of_another_length(make_trainer):
    """The new weights let other samples through the gate, so that the first epoch has another number of batches."""

    def run(hook):
        module, first = Late(hook), First()
        callback = MiniRec(
            40, selector=MiniRecSelector(gate=(0.3, 0.9)), probe=Counting("classifier"), rescore_fraction=0.0
        )
        trainer = make_trainer(callbacks=[callback, first], max_epochs=1, limit_val_batches=1)
        trainer.fit(module, loader_of(shuffle=True), loader_of())
        return module, first

    plain, late, early = run("never"), run("on_train_start"), run("__init__")
    assert len(plain[1].kept[1]) != len(early[1].kept[1])
    assert_same(late, early)
    assert len(late[0].rows(0)) == len(early[1].kept[1])


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_on_two_ranks(make_trainer, tmp_path, workers):
    def run(hook):
        loader = loader_of(shuffle=True, num_workers=workers, batch_size=4)
        folder = tmp_path / hook
        folder.mkdir()
        fit(make_trainer, hook, loader, First(folder), devices=2, strategy="ddp_fork")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    for late, early in zip(run("on_train_start"), run("__init__"), strict=True):
        assert late["plan"] == early["plan"]
        assert late["seen"] == early["seen"]
        assert torch.equal(late["weights"], early["weights"])
        assert late["probed"] == early["probed"] + 30


@pytest.mark.parametrize("save_at", [1, 3, 4])  # inside an epoch of three batches, at its end, in the next
def test_a_resumed_run_is_not_scored_again(make_trainer, tmp_path, save_at):
    class Save(Callback):
        met = 0

        def on_train_batch_end(self, trainer, *_):
            self.met += 1
            if self.met == save_at:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def run(resumed=False):
        module = Late("on_train_start")
        module.resumed = resumed
        torch.manual_seed(6 if resumed else 5)
        callback = MiniRec(
            24, selector=MiniRecSelector(gate=(-1.0, 2.0)), probe=Counting("classifier"), rescore_fraction=0.5
        )
        trainer = make_trainer(callbacks=[callback, *([] if resumed else [Save()])], max_epochs=3)
        trainer.fit(module, loader_of(shuffle=True), ckpt_path=tmp_path / "saved.ckpt" if resumed else None)
        return module

    whole, resumed = run(), run(resumed=True)
    assert resumed.batches == whole.batches[save_at:]
    assert torch.equal(resumed.path[-1], whole.path[-1])
    assert resumed.probed == (whole.probed - 120 if save_at <= 3 else 30)


@pytest.mark.parametrize("late", [True, False])
def test_a_policy_forgets_where_it_started(make_trainer, toy_data, tiny_policy, late):
    class LatePolicy(GRPORecModule):
        def on_train_start(self):
            super().on_train_start()
            if late:
                set_weights(self.policy)

    module, first = LatePolicy(tiny_policy(), num_generations=2, scoring_generations=2), First()
    module.rollout_seed = 3
    if not late:
        set_weights(module.policy)
    selector = MiniRecSelector(gate=(-1.0, 2.0), gradient="trajectory")
    trainer = make_trainer(callbacks=[MiniRec(16, selector=selector), first], max_epochs=1)
    trainer.fit(module, toy_data(pool_samples=24))
    assert session_of(trainer).store.read(first.kept[1], vectors=False).alignment is None
    start = dict(module.trajectory.start)
    reference = tiny_policy()
    set_weights(reference)
    assert start
    assert all(any(torch.equal(value, own) for own in reference.parameters()) for value in start.values())


def test_weights_put_back_on_purpose_are_not_scored(make_trainer, toy_data, tiny_policy):
    """As `warm_start.reset_policy` has it: the warm policy selects, and the weights before it are trained."""
    policy = tiny_policy()
    back = _StartWeights(policy)
    set_weights(policy)
    module, data = GRPORecModule(policy, num_generations=2, scoring_generations=2), toy_data(pool_samples=24)
    callback = MiniRec(16, selector=MiniRecSelector(gate=(-1.0, 2.0)), every_n_epochs=9, rescore_fraction=0.0)
    make_trainer(callbacks=[callback, back], max_epochs=1).fit(module, data)
    assert module.cost.rollouts["scoring"] == 24 * 2
