"""Every sample of a plan is trained on or counted, with the reason why not."""

import warnings

import pandas as pd
import pytest
import torch
from helpers.foreign import Classifier, loader_of
from helpers.slow import slow
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.selection import RandomSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(Classifier):
    """May stop its epochs or return no loss at some batch."""

    stops_at = no_loss_at = None

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.stops_at else None

    def training_step(self, batch, batch_idx):
        if batch_idx == self.no_loss_at:
            return None
        return super().training_step(batch, batch_idx)


class Plans(Callback):
    def __init__(self, folder=None):
        self.folder, self.plans = folder, {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.plans[trainer.current_epoch] = session_of(trainer).plan

    def on_train_end(self, trainer, pl_module):
        if self.folder is not None:
            torch.save([self.plans, pl_module.seen], self.folder / f"{trainer.global_rank}.pt")


def fit(make_trainer, folder, module, data, budget=30, **options):
    """Returns the plans, and what was logged: epoch to reason to count."""
    plans = Plans(folder if "devices" in options else None)
    logger = CSVLogger(folder, name="", version="logs")
    callback = MiniRec(budget, selector=RandomSelector(redraw=True), curriculum="shuffled")
    make_trainer(callbacks=[callback, plans], logger=logger, **options).fit(module, data)
    table = pd.read_csv(folder / "logs" / "metrics.csv")
    names = [name for name in table if name.startswith("selection/dropped_")]
    return plans.plans, {name.removeprefix("selection/dropped_"): table[name].dropna().tolist() for name in names}


CASES = {
    "all": ({}, {}, {}, {}),
    "drop_last": ({"drop_last": True}, {}, {}, {"incomplete_batch": [6, 6]}),
    "limit": ({}, {"limit_train_batches": 2}, {}, {"limit": [14, 14]}),
    "both": ({"drop_last": True}, {"limit_train_batches": 0.5}, {}, {"incomplete_batch": [6, 6], "limit": [16, 16]}),
    "workers": ({"drop_last": True, "num_workers": 2}, {}, {}, {"incomplete_batch": [6, 6]}),
    "max_steps": ({}, {"max_steps": 5}, {}, {"early_stop": [22]}),
    "stopped": ({}, {}, {"stops_at": 1}, {"early_stop": [22, 22]}),
    "no loss": ({}, {}, {"no_loss_at": 3}, {"no_loss": [6, 6]}),
    "no loss, limit": ({}, {"limit_train_batches": 3}, {"no_loss_at": 0}, {"limit": [6, 6], "no_loss": [8, 8]}),
    "fast_dev_run": ({"drop_last": True}, {"fast_dev_run": 2}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_and_not_trained_on(make_trainer, tmp_path, case):
    loader, options, module_options, expected = CASES[case]
    module = Module()
    for name, value in module_options.items():
        setattr(module, name, value)
    if case == "fast_dev_run":  # has no logger, and is asked for a few batches
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*are not trained on")
            trainer = make_trainer(callbacks=[MiniRec(30, selector=RandomSelector(), curriculum="shuffled")], **options)
            trainer.fit(module, loader_of(**loader))
        return
    plans, logged = fit(make_trainer, tmp_path, module, loader_of(shuffle=True, **loader), **options)
    assert logged == expected
    for epoch, plan in plans.items():
        left_out = set(plan) - set(module.rows(epoch))
        assert len(left_out) == sum(
            counts[epoch - len(plans)] for counts in logged.values() if -len(counts) <= epoch - 2
        )


def test_what_can_be_helped_is_warned_of_once(make_trainer, tmp_path):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        options = {"limit_train_batches": 2, "max_epochs": 3}
        fit(make_trainer, tmp_path, Module(), loader_of(drop_last=True), **options)
    found = [str(warning.message) for warning in met if "are not trained on" in str(warning.message)]
    assert found == [
        "6 of the 30 samples planned for epoch 1 are not trained on, since drop_last=True drops a batch of less than "
        "8: set drop_last=False, or a budget that is a multiple of 8 times 1, the number of ranks",
        "8 of the 30 samples planned for epoch 1 are not trained on, since limit_train_batches is 2: leave it out, or "
        "lower the budget",
    ]


def test_the_whole_pool_is_counted_without_a_warning(make_trainer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*are not trained on")
        _, logged = fit(make_trainer, tmp_path, Module(), loader_of(drop_last=True), budget=60, max_epochs=1)
    assert logged == {"incomplete_batch": [4]}


def test_on_two_ranks(make_trainer, tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "limit_train_batches": 3}
    _, logged = fit(make_trainer, tmp_path, Module(), loader_of(batch_size=4, drop_last=True), budget=37, **options)
    assert logged == {"incomplete_batch": [5, 5], "limit": [8, 8]}
    (plans, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for epoch, plan in plans.items():
        trained = {row for seen in (first, second) for batch in seen[epoch] for row in batch}
        assert len(plan) - len(trained) == 13


@pytest.mark.parametrize(
    ("iterations", "steps", "limit", "expected"),
    [(1, 1, 3, {"limit": [6.0, 6.0]}), slow(2, 2, 5, {"limit": [6.0, 6.0]}), slow(2, 2, 6, {})],
)
def test_batches_that_are_used_several_times(
    make_trainer, tmp_path, toy_data, tiny_policy, iterations, steps, limit, expected
):
    class Counting(GRPORecModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.met.setdefault(self.current_epoch, set()).update(batch["sample_id"].tolist())

    module = Counting(tiny_policy(), num_generations=2, num_iterations=iterations, steps_per_generation=steps)
    module.met = {}
    options = {"limit_train_batches": limit}
    data = toy_data(batch_size=8, pool_samples=40)
    plans, logged = fit(make_trainer, tmp_path, module, data, budget=30, **options)
    assert logged == expected
    for epoch, plan in plans.items():
        assert len(set(plan) - module.met[epoch]) == sum(counts[epoch] for counts in logged.values())


def test_a_plan_that_the_run_ends_before(make_trainer, tmp_path):
    """`EarlyStopping` decides once the next epoch is planned."""
    plans, callback = Plans(), MiniRec(30, selector=RandomSelector(), curriculum="shuffled")
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    logger = CSVLogger(tmp_path, name="", version="logs")
    trainer = make_trainer(callbacks=[callback, plans, stop], logger=logger, max_epochs=9, limit_val_batches=1)
    trainer.fit(Module(), loader_of(), loader_of())
    assert sorted(plans.plans) == [0, 1]
    assert session_of(trainer).plan_epoch == 2
    dropped = pd.read_csv(tmp_path / "logs" / "metrics.csv")["selection/dropped_early_stop"]
    assert dropped.dropna().tolist() == [30]
