"""Selection with `wasted_groups: dynamic_sampling`: what was drawn in vain is charged, known, and not trained on."""

import math

import pytest
import torch
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.selection import ExpectedUpdateSelector, MiniRecSelector, RandomSelector
from minirec_pl.selection.selectors.picks import best_first, ledger_of
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples
GROUP, PICKED = 3, 30


class Own:
    """A selector of a user's own: lowest sample_id first."""

    needs: frozenset[str] = frozenset()

    def select(self, signals, k, *, epoch=0):
        value = -signals.sample_id.double()
        return ledger_of(signals, best_first(value, k), k, {"value": value}, {})


def rare(completions, **columns):
    """Leaves most groups of three without variance."""
    return [float(int(item.removeprefix("i")) % 9 == 0) for item in completions]


class Recorder:
    """The reward, and a list of what it was asked: (sample_id, rewards of the group)."""

    def __init__(self):
        self.groups = []

    def __call__(self, completions, sample_id):
        rewards = rare(completions)
        for start in range(0, len(rewards), GROUP):
            self.groups.append((sample_id[start], rewards[start : start + GROUP]))
        return rewards


SELECTORS = {
    "random": lambda: MiniRec(PICKED, selector=RandomSelector(redraw=True), curriculum="shuffled"),
    "minirec": lambda: MiniRec(PICKED, selector=MiniRecSelector(gate=(-1.0, 2.0))),
    "expected update": lambda: MiniRec(PICKED, selector=ExpectedUpdateSelector()),
    "own": lambda: MiniRec(PICKED, selector=Own(), curriculum="shuffled"),
}


class Watch(Callback):
    def __init__(self):
        self.plans, self.trained, self.drawn = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.plans.append(list(session_of(trainer).plan))
        self.trained.append([])
        self.drawn.append(len(pl_module.rewards[0].groups))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained[-1] += outputs["trained"].tolist()


def module_of(policy, reward):
    filters = {"wasted_groups": "dynamic_sampling", "oversample": 2.0}
    return GRPORecModule(
        policy, [reward], num_generations=GROUP, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **filters
    )


@pytest.mark.parametrize("name", SELECTORS)
def test_what_was_drawn_in_vain_is_charged_and_known_and_not_trained_on(name, tiny_policy, toy_data, make_trainer):
    reward, watch = Recorder(), Watch()
    module = module_of(tiny_policy(), reward)
    scored = []
    roll_out = type(module).sample_signals

    def sample_signals(batch, *arguments, **options):
        before = len(reward.groups)
        signals = roll_out(module, batch, *arguments, **options)
        scored.append((before, len(reward.groups)))
        return signals

    module.sample_signals = sample_signals  # scoring calls the reward too
    trainer = make_trainer(max_epochs=3, callbacks=[SELECTORS[name](), watch])
    trainer.fit(module, toy_data(**SMALL, batch_size=4))
    of_scoring = {place for start, end in scored for place in range(start, end)}
    in_training = [place for place in range(len(reward.groups)) if place not in of_scoring]
    # Every group that was drawn is charged, whether it was trained on or not.
    assert module.cost.rollouts["training"] == GROUP * len(in_training)
    flat, mixed, last = {}, {}, {}
    ends = [*watch.drawn[1:], len(reward.groups)]
    for epoch, (start, end) in enumerate(zip(watch.drawn, ends, strict=True)):
        drawn = [reward.groups[place] for place in in_training if start <= place < end]
        assert {sample_id for sample_id, _ in drawn} <= set(watch.plans[epoch])
        varied = {sample_id for sample_id, rewards in drawn if len(set(rewards)) > 1}
        assert set(watch.trained[epoch]) <= varied
        assert len(watch.trained[epoch]) > 0
        returned = [sample_id for sample_id, rewards in drawn if len(set(rewards)) == 1]
        assert len(returned) > len(watch.trained[epoch])
        for sample_id, rewards in drawn:
            counts = flat if len(set(rewards)) == 1 else mixed
            counts[sample_id] = counts.get(sample_id, 0) + 1
            last[sample_id] = (epoch, sum(rewards) / GROUP)
    # What returned is as well known as what was trained on.
    store = session_of(trainer).store
    met = sorted(last)
    assert store.wasted_groups(met).tolist() == [flat.get(sample_id, 0) for sample_id in met]
    view = store.read(met, vectors=False)
    ages = dict(zip(store.sample_ids.tolist(), store.clock("reward_epoch").tolist(), strict=True))
    for place, sample_id in enumerate(met):
        epoch, mean = last[sample_id]
        assert ages[sample_id] >= epoch
        if not scored:
            assert float(view.reward_mean[place]) == pytest.approx(mean)
            assert int(view.n_rollouts[place]) == GROUP
    assert not math.isnan(float(view.reward_mean.sum()))


class Digest(Callback):
    """Writes what a rank knows at the end of the first epoch, and what it has drawn and trained on."""

    def __init__(self, folder):
        self.folder, self.trained = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained += outputs["trained"].tolist()

    def on_fit_end(self, trainer, pl_module):
        store = session_of(trainer).store
        known = {"digest": store.digest(), "flat": store.wasted_groups(store.sample_ids), "ids": store.sample_ids}
        drawn = {"drawn": pl_module.rewards[0].groups, "trained": self.trained}
        torch.save({**known, **drawn}, self.folder / f"rank-{trainer.global_rank}.pt")


def test_ranks_know_of_all_that_returned_on_any_of_them(tiny_policy, toy_data, make_trainer, tmp_path):
    callbacks = [SELECTORS["random"](), Digest(tmp_path)]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks, strategy="ddp_fork", devices=2)
    trainer.fit(module_of(tiny_policy(), Recorder()), toy_data(**SMALL, batch_size=4))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    returned = {i for rank in ranks for i, rewards in rank["drawn"] if len(set(rewards)) == 1}
    assert len(returned) > 5
    flat = ranks[0]["flat"]
    assert set(ranks[0]["ids"][flat > 0].tolist()) == returned
    assert not returned & {i for rank in ranks for i in rank["trained"]}


class SaveAt(Callback):
    def __init__(self, path, batch):
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [2, 4, slow(7)])
@pytest.mark.parametrize("name", ["random", "minirec"])
def test_a_run_resumes_bit_for_bit(name, at, tiny_policy, toy_data, make_trainer, tmp_path):
    def run(callbacks, ckpt=None):
        torch.manual_seed(3)
        module = module_of(tiny_policy(), Recorder())
        trainer = make_trainer(max_epochs=3, callbacks=[SELECTORS[name](), *callbacks])
        trainer.fit(module, toy_data(**SMALL, batch_size=4), ckpt_path=ckpt)
        session = session_of(trainer)
        return module.state_dict(), session.store.digest(), session.plan, module.cost.rollouts

    whole, resumed = run([SaveAt(tmp_path / "at.ckpt", at)]), run([], str(tmp_path / "at.ckpt"))
    assert all(torch.equal(value, resumed[0][key]) for key, value in whole[0].items())
    assert whole[1:] == resumed[1:]
