"""The Trainer's searches for a learning rate and a batch size, beside the selection."""

import pytest
import torch
from helpers.foreign import Classifier, loader_of
from helpers.slow import slow
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")


def minirec(budget=30):
    return MiniRec(budget, selector=MiniRecSelector(gate=(-1.0, 2.0)), probe=HeadProbe("classifier"))


class Sized(Classifier):
    """Its loader has the batch size that a search sets."""

    def __init__(self):
        super().__init__(loader=lambda: loader_of(batch_size=self.batch_size, shuffle=True))
        self.batch_size = 4

    def val_dataloader(self):
        return loader_of()


class Short(LearningRateFinder):
    def __init__(self):
        super().__init__(num_training_steps=12, early_stop_threshold=None)


def plans(module):
    return [len(module.rows(epoch)) for epoch in sorted(module.seen)]


def test_lr_find_searches_on_the_whole_pool_and_the_fit_then_selects(make_trainer):
    searched = []
    for callbacks in ([], [minirec()]):
        module = Sized()
        trainer = make_trainer(callbacks=callbacks)
        torch.manual_seed(0)
        found = Tuner(trainer).lr_find(module, num_training=12, early_stop_threshold=None)
        searched.append((found.results["loss"], module.batches[:12], module.lr))
        module.seen = {}
        trainer.fit(module)
    assert searched[0] == searched[1]
    assert plans(module) == [30, 30]
    assert module.rows(1) == session_of(trainer).plan
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr


def test_scale_batch_size_is_kept_by_the_fit_that_selects(make_trainer):
    module = Sized()
    trainer = make_trainer(callbacks=[minirec()])
    size = Tuner(trainer).scale_batch_size(module, init_val=2, max_trials=3, steps_per_trial=1)
    assert size == module.batch_size == 8
    module.seen = {}
    trainer.fit(module)
    assert [[len(batch) for batch in module.seen[epoch]] for epoch in range(2)] == [[8, 8, 8, 6]] * 2


@pytest.mark.parametrize("first", [slow(True), False])
def test_search_callbacks_come_first_wherever_they_stand(make_trainer, first):
    module = Sized()
    finders = [BatchSizeFinder(init_val=2, max_trials=3, steps_per_trial=1), Short()]
    callbacks = [*finders, minirec()] if first else [minirec(), *finders]
    trainer = make_trainer(callbacks=callbacks)
    trainer.fit(module)
    assert module.batch_size == 8
    last = module.seen[1][-4:]
    assert [len(batch) for batch in last] == [8, 8, 8, 6]
    assert [row for batch in last for row in batch] == session_of(trainer).plan
