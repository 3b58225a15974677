"""Two processes on gloo: what each rank's `training_step` got, what they selected, and what one process would have."""

import time

import pytest
import torch
from helpers.foreign import Classifier, N, loader_of
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from minirec_pl import InputError
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RescoreSamples, RewardHistory
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector, SampleSignals
from minirec_pl.selection.session.session import session_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:selection"),
    pytest.mark.filterwarnings("ignore:picked"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*use of fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def minirec(budget=0.5, **options):
    options = {"rescore_fraction": 1.0, "probe": HeadProbe("classifier"), **options}
    return MiniRec(budget, selector=MiniRecSelector(gate=(-1.0, 2.0)), **options)


class Rewarding(Classifier):
    """Also returns a reward for each sample: its row."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rewards = (batch[0][:, :1] * 1000).round().expand(-1, 2)
        return {"loss": loss, "signals": SampleSignals(torch.arange(len(rewards)), rewards=rewards)}


class Note(Callback):
    """Writes what a rank met and knew to a file of its own."""

    def __init__(self, folder):
        self.folder, self.plans, self.rewards = folder, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        session = session_of(trainer)
        self.plans.append(session.plan)
        self.rewards.append(session.store.read(range(N)).reward_mean)

    def on_train_end(self, trainer, pl_module):
        session = session_of(trainer)
        state = {"seen": pl_module.seen, "plans": self.plans, "rewards": self.rewards, "weights": pl_module.path[-1]}
        met = session.store.read(range(N)).reward_mean
        torch.save({**state, "met": met, "digest": session.store.digest()}, self.folder / f"{trainer.global_rank}.pt")


def run(make_trainer, folder, callback, devices=2, module=Classifier, epochs=2, **loader):
    folder.mkdir(exist_ok=True)
    strategy = "ddp_fork" if devices > 1 else "auto"
    trainer = make_trainer(callbacks=[callback, Note(folder)], devices=devices, strategy=strategy, max_epochs=epochs)
    trainer.fit(module(), loader_of(**{"batch_size": 8 // devices, **loader}))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


def rows(state, epoch):
    return [row for batch in state["seen"][epoch] for row in batch]


@pytest.mark.parametrize(("budget", "workers"), [(30, 0), (31, 2)])
def test_ranks_share_out_one_selection(make_trainer, tmp_path, budget, workers):
    first, second = run(make_trainer, tmp_path, minirec(budget), num_workers=workers, shuffle=True)
    assert first["digest"] == second["digest"]
    assert first["plans"] == second["plans"]
    for epoch, plan in enumerate(first["plans"]):
        ours, theirs = rows(first, epoch), rows(second, epoch)
        assert len(plan) == len(set(plan)) == budget
        assert len(ours) == len(theirs) == -(-budget // 2)
        padded = [*plan, *plan[: budget % 2]]
        assert ours == padded[0::2]
        assert theirs == padded[1::2]
        assert len(set(ours) & set(theirs)) == 0 or budget % 2


def test_two_ranks_select_and_train_as_one_process(make_trainer, tmp_path):
    callback = {"curriculum": EasyToHardCurriculum(n_folds=2)}
    (one,) = run(make_trainer, tmp_path / "one", minirec(32, **callback), devices=1)
    two, _ = run(make_trainer, tmp_path / "two", minirec(32, **callback))
    assert one["plans"][0] == two["plans"][0]
    assert set(one["plans"][1]) == set(two["plans"][1])
    torch.testing.assert_close(one["weights"], two["weights"], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(one["rewards"], two["rewards"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_plan_ranks_get_what_lightning_would_give_them(make_trainer, tmp_path):
    plain = make_trainer(callbacks=[Plain(tmp_path)], devices=2, strategy="ddp_fork")
    plain.fit(Classifier(), loader_of(batch_size=4, shuffle=True))
    states = run(make_trainer, tmp_path, RescoreSamples(0.5, HeadProbe("classifier")), shuffle=True)
    for rank, state in enumerate(states):
        expected = torch.load(tmp_path / f"plain-{rank}.pt", weights_only=True)
        assert state["seen"] == expected["seen"]
        assert torch.equal(state["weights"], expected["weights"])


class Plain(Note):
    def on_train_epoch_start(self, trainer, pl_module):
        pass

    def on_train_end(self, trainer, pl_module):
        state = {"seen": pl_module.seen, "weights": pl_module.path[-1]}
        torch.save(state, self.folder / f"plain-{trainer.global_rank}.pt")


def test_rewards_met_on_a_rank_reach_every_store(make_trainer, tmp_path):
    first, second = run(make_trainer, tmp_path, RewardHistory(), module=Rewarding, epochs=1, shuffle=True)
    assert sorted(rows(first, 0) + rows(second, 0)) == list(range(N))
    assert first["met"].tolist() == second["met"].tolist() == list(range(N))


class Failing(HeadProbe):
    def __call__(self, module, batch, sample_id, gradient="first"):
        if module.global_rank == 1:
            raise RuntimeError("no more memory")
        return super().__call__(module, batch, sample_id, gradient)


class Told(MiniRec):
    """Writes down what stopped a rank."""

    folder = None

    def on_fit_start(self, trainer, pl_module):
        try:
            super().on_fit_start(trainer, pl_module)
        except Exception as error:
            (self.folder / f"{trainer.global_rank}").write_text(f"{type(error).__name__}: {error}")
            time.sleep(1)  # a rank that ends takes the others with it
            raise


def test_a_rank_that_fails_stops_the_others_with_a_message(make_trainer, tmp_path):
    callback = Told(0.5, probe=Failing("classifier"))
    callback.folder = tmp_path
    trainer = make_trainer(callbacks=[callback], devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match="no more memory"):
        trainer.fit(Classifier(), loader_of())
    assert (tmp_path / "1").read_text() == "RuntimeError: no more memory"
    told = (tmp_path / "0").read_text()
    assert told == "InputError: rank 1 failed and stops the others: RuntimeError: no more memory"


def test_sharded_strategies_are_refused_for_gradient_signals(make_trainer, monkeypatch):
    trainers = [make_trainer() for _ in range(3)]
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy(accelerator=None))
    for probe in (None, HeadProbe("classifier")):
        with pytest.raises(InputError, match=r"FSDPStrategy spreads the weights.*signals: \[reward, embedding\]"):
            RescoreSamples(0.1, probe).setup(trainers.pop(), Classifier(), "fit")
    without = HeadProbe("classifier", signals=["reward", "embedding"])
    RescoreSamples(0.1, without).setup(trainers.pop(), Classifier(), "fit")
