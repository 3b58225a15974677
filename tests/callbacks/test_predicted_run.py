"""Real runs whose selector goes by the outcomes of training: nothing is scored, they resume, and ranks agree."""

import pandas as pd
import pytest
import torch
from helpers.foreign import Classifier, N, loader_of
from helpers.paths import REPOSITORY
from helpers.slow import slow
from helpers.tiny_config import TINY
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from minirec_pl import GRPORecModule, InputError, RecDataModule, WarmStartModule
from minirec_pl.callbacks import MiniRec, SelectSamples
from minirec_pl.policy import GenerativePolicy
from minirec_pl.selection import (
    GRESOSelector,
    MiniRecSelector,
    MoPPSSelector,
    PredictedDifficulty,
    PredictedSelector,
    RandomSelector,
    SampleSignals,
    SignalStore,
    calibration,
)
from minirec_pl.selection.session.session import session_of

DATA = str(REPOSITORY / "data")
ML_100K = REPOSITORY / "data" / "ml-100k"
SELECTORS = [PredictedSelector, MoPPSSelector, GRESOSelector]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:predicted difficulty"),
    pytest.mark.filterwarnings("ignore:.*use of fork"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
]


class Watch(Callback):
    """Notes plans and the groups that are met; saves after some batch."""

    def __init__(self, path=None, save_at=None):
        self.path, self.save_at, self.plans, self.met, self.batches = path, save_at, [], [], 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.plans.append(session_of(trainer).plan)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.met.append(outputs["signals"])
        self.batches += 1
        if self.batches == self.save_at:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.save_at == "epoch end" and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def module(**options):
    torch.manual_seed(0)
    return GRPORecModule(
        GenerativePolicy(config=TINY),
        num_generations=4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.02),
        **options,
    )


def data(toy_path):
    return RecDataModule(str(toy_path), "toy", warm_fraction=0.5, batch_size=8, seed=1)


@pytest.mark.parametrize("make", SELECTORS)
def test_nothing_is_scored_and_outcomes_reach_the_store(make_trainer, toy_path, make):
    watch = Watch()
    trainer = make_trainer(callbacks=[MiniRec(48, selector=make()), watch], max_epochs=3)
    model = module(scoring_generations=4)
    trainer.fit(model, data(toy_path))
    assert model.cost.tokens_forward["scoring"] == model.cost.tokens_backward["scoring"] == 0
    assert model.cost.rollouts["scoring"] == 0
    assert model.cost.rollouts["training"] == 3 * 48 * 4
    assert [len(set(plan)) for plan in watch.plans] == [48] * 3
    again = SignalStore(session_of(trainer).store.sample_ids)
    for signals in watch.met:
        again.update(signals, epoch=0, step=0, source="train")
    store = session_of(trainer).store
    assert torch.equal(store.pool_view(0).hits, again.pool_view(0).hits)
    assert float((store.pool_view(0).hits + store.pool_view(0).misses).sum()) > 0


def test_predictions_are_logged_drawn_and_left_in_the_files(make_trainer, toy_path, tmp_path):
    watch = Watch()
    trainer = make_trainer(
        callbacks=[MiniRec(48, selector=PredictedSelector()), watch],
        max_epochs=3,
        logger=CSVLogger(tmp_path / "log", name="", version=""),
        log_every_n_steps=1,
    )
    priors = []

    class Prior(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            priors.append(session_of(trainer).store.posterior_mean())

    trainer.callbacks.append(Prior())
    trainer.fit(module(), data(toy_path))
    rows = pd.read_csv(tmp_path / "log" / "metrics.csv")
    logged = rows["selection/predicted_brier"].dropna().tolist()
    ids = session_of(trainer).store.sample_ids
    for epoch, value in enumerate(logged):
        met = SampleSignals.cat(watch.met[6 * epoch : 6 * epoch + 6])
        hits = (met.rewards > 0.5).sum(dim=1).double()
        before = priors[epoch][torch.searchsorted(ids, met.sample_id)]
        expected = calibration(before.numpy(), hits.numpy(), (4 - hits).numpy())
        assert value == pytest.approx(expected.brier)
    assert len(logged) == 3
    assert {"selection/predicted_brier_of_mean", "selection/predicted_reliability/mean_10"} <= set(rows.columns)
    assert (tmp_path / "log" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    left = SignalStore.load(tmp_path / "log" / "signals.safetensors")
    assert torch.equal(left.posterior_mean(), session_of(trainer).store.posterior_mean())
    plan = pd.read_parquet(tmp_path / "log" / "plan.parquet")
    assert set(plan["measure"]) == {"predicted solve probability"}


@pytest.mark.parametrize(
    ("make", "save_at"),
    [
        (PredictedSelector, 4),
        (PredictedSelector, "epoch end"),
        (GRESOSelector, 8),
        *(slow(make, place) for make in SELECTORS for place in (3, 6, 9, "epoch end")),
    ],
)
def test_it_resumes_bit_for_bit(make_trainer, toy_path, tmp_path, make, save_at):
    ends = []
    for resumed in (False, True):
        watch = Watch(tmp_path / "saved.ckpt", None if resumed else save_at)
        selector = make(step=0.1) if make is GRESOSelector else make()
        part = MiniRec(48, selector=selector)
        trainer = make_trainer(callbacks=[part, watch], max_epochs=4)
        model = module()
        trainer.fit(model, data(toy_path), ckpt_path=tmp_path / "saved.ckpt" if resumed else None)
        states = [p.state_dict() for p in part.parts]
        ends.append((model.state_dict(), session_of(trainer).store.digest(), session_of(trainer).plan, states))
    (weights, *others), (weights_after, *others_after) = ends
    assert all(torch.equal(value, weights_after[name]) for name, value in weights.items())
    assert others == others_after


class Rewarding(Classifier):
    """Rewards that depend on the sample alone: even rows hit in both rollouts, others in one or none."""

    signals = True

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        row = (batch[0][:, 0] * 1000).round().long()
        rewards = torch.stack([row % 2 == 0, row % 4 < 2], dim=1).float()
        return (
            {"loss": loss, "signals": SampleSignals(torch.arange(len(row)), rewards=rewards)} if self.signals else loss
        )


class Ends(Callback):
    def __init__(self, folder):
        self.folder, self.plans = folder, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.plans.append(session_of(trainer).plan)

    def on_train_end(self, trainer, pl_module):
        state = {"plans": self.plans, "digest": session_of(trainer).store.digest()}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("make", SELECTORS)
def test_two_ranks_agree(make_trainer, tmp_path, make):
    callbacks = [MiniRec(32, selector=make()), Ends(tmp_path)]
    trainer = make_trainer(callbacks=callbacks, devices=2, strategy="ddp_fork", max_epochs=3)
    trainer.fit(Rewarding(), loader_of(batch_size=4, shuffle=True))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert [len(set(plan)) for plan in first["plans"]] == [32] * 3
    assert len({tuple(plan) for plan in first["plans"]}) == 3


@pytest.mark.filterwarnings("default:predicted difficulty")
def test_a_foreign_loader_has_no_features_and_is_told_so(make_trainer):
    trainer = make_trainer(callbacks=[MiniRec(32, selector=PredictedSelector())], max_epochs=3)
    with pytest.warns(UserWarning, match="predicted the same for all never met: define sample_features"):
        trainer.fit(Rewarding(), loader_of(batch_size=8))
    store = session_of(trainer).store
    view = store.read(range(N))
    met = (view.hits + view.misses) > 0
    assert 32 < int(met.sum()) <= N
    mean = store.posterior_mean()
    assert float(mean[met & (view.misses == 0)].mean()) > float(mean[met & (view.hits == 0)].mean()) + 0.05


class WithHook(RecDataModule):
    found = None

    def sample_features(self, sample_ids):
        return self.found(sample_ids)


def test_features_of_another_datamodule(make_trainer, toy_path):
    def fit(found):
        made = WithHook(str(toy_path), "toy", warm_fraction=0.5, batch_size=8, seed=1)
        made.found = found
        trainer = make_trainer(callbacks=[MiniRec(16, selector=PredictedSelector())], max_epochs=2)
        trainer.fit(module(), made)
        return session_of(trainer)

    assert fit(lambda ids: pd.DataFrame({"a": ids % 3})).store.has_prior
    with pytest.raises(InputError, match=r"WithHook\.sample_features returned a dict: return a pandas DataFrame"):
        fit(lambda ids: {"a": ids})
    with pytest.raises(InputError, match="the features have 2 rows"):
        fit(lambda ids: pd.DataFrame({"a": [1.0, 2.0]}))
    with pytest.warns(UserWarning, match=r"predicted difficulty: the feature a is NaN for"):
        fit(lambda ids: pd.DataFrame({"a": [None if i % 2 else 1.0 for i in ids]}))


def test_outcomes_that_never_arrive_are_named(make_trainer):
    alone = make_trainer(callbacks=[SelectSamples(16, selector=PredictedSelector())])
    with pytest.raises(
        InputError, match=r"PredictedSelector goes by the rewards met in training: add .* RewardHistory"
    ):
        alone.fit(Rewarding(), loader_of())
    Rewarding.signals = False
    try:
        trainer = make_trainer(callbacks=[MiniRec(16, selector=MoPPSSelector())])
        with pytest.warns(UserWarning, match="training_step of Rewarding returned none: return"):
            trainer.fit(Rewarding(), loader_of())
    finally:
        Rewarding.signals = True


def test_minirec_scores_embeddings_and_takes_the_difficulty_from_the_prediction(make_trainer, toy_path):
    selector = MiniRecSelector(signals="predicted", gate=(0.0, 1.0))
    trainer = make_trainer(callbacks=[MiniRec(16, selector=selector, rescore_fraction=0.0)], max_epochs=2)
    with pytest.warns(
        UserWarning, match="scoring draws 4 rollouts of each sample, which MiniRecSelector does not read"
    ):
        trainer.fit(module(scoring_generations=4), data(toy_path))
    session = session_of(trainer)
    assert session.ledger.difficulty_name == "predicted solve probability"
    lean = module(scoring_generations=0)
    again = make_trainer(callbacks=[MiniRec(16, selector=selector, rescore_fraction=0.0)], max_epochs=2)
    again.fit(lean, data(toy_path))
    assert lean.cost.rollouts["scoring"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not ML_100K.is_dir(), reason="MovieLens-100K is not there: minirec fetch ml-100k --to data")
def test_out_of_fold_predictions_beat_the_mean_on_movielens(make_trainer, capsys):
    """16 rollouts of 2,048 random samples of the pool, of a policy that stays as it was warmed up."""
    torch.manual_seed(0)
    policy = GenerativePolicy(
        config={**TINY, "hidden_size": 48, "intermediate_size": 96, "max_position_embeddings": 128}
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    warm = Trainer(max_epochs=6, accelerator="cpu", enable_checkpointing=False, **quiet)
    warm.fit(
        WarmStartModule(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3)),
        RecDataModule(DATA, "ml-100k", train_on="warm"),
    )
    trainer = make_trainer(callbacks=[MiniRec(2048, selector=RandomSelector(), curriculum="shuffled")], max_epochs=1)
    made = RecDataModule(DATA, "ml-100k")
    trainer.fit(GRPORecModule(policy, num_generations=16, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), made)
    view = session_of(trainer).store.pool_view(0)
    features = made.sample_features(view.sample_id.numpy()).table
    found = PredictedDifficulty().predict(view.hits, view.misses, features)
    met = (view.hits + view.misses) > 0
    figures = calibration(*(value[met].numpy() for value in (found.mean, view.hits, view.misses)))
    with capsys.disabled():
        print(
            f"\nout-of-fold Brier {figures.brier:.5f}, of the mean {figures.brier_of_mean:.5f}, AUC {figures.auc:.3f}"
        )
    assert int(met.sum()) == 2048
    assert figures.brier < figures.brier_of_mean
    assert figures.auc > 0.6


@pytest.mark.parametrize("rollouts", ["expected", "supervised"])
def test_streaks_need_rollouts(rollouts, toy_data, make_trainer):
    trainer = make_trainer(callbacks=[MiniRec(0.25, selector=GRESOSelector(), curriculum="shuffled")])
    with pytest.raises(InputError, match=f"goes by groups of rollouts and rollouts='{rollouts}' draws none: choose"):
        trainer.fit(module(rollouts=rollouts), toy_data())


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"rollouts": "beam"}, "rollouts='beam' draws rollouts that are all different"),
        ({"distinct_rollouts": True}, "distinct_rollouts has them all different"),
    ],
)
def test_streaks_need_rollouts_that_may_be_equal(options, given, toy_data, make_trainer):
    """Their rewards do not reach the store, so every streak would stay 0 and all samples be kept."""
    trainer = make_trainer(callbacks=[MiniRec(0.25, selector=GRESOSelector(), curriculum="shuffled")])
    with pytest.raises(InputError, match=f"GRESOSelector goes by groups of rollouts and {given}: choose Predicted"):
        trainer.fit(module(**options), toy_data())


def test_exact_probabilities_are_compared_with_the_predictions_too(make_trainer, toy_path, tmp_path):
    watch, priors = Watch(), []

    class Prior(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            priors.append(session_of(trainer).store.posterior_mean(batch["sample_id"]))

    logger = CSVLogger(tmp_path / "log", name="", version="")
    callbacks = [MiniRec(48, selector=PredictedSelector()), Prior(), watch]
    make_trainer(callbacks=callbacks, max_epochs=2, logger=logger).fit(module(rollouts="expected"), data(toy_path))
    found = pd.read_csv(tmp_path / "log" / "metrics.csv")["selection/predicted_brier"].dropna().tolist()
    per_epoch = len(priors) // 2
    for epoch, brier in enumerate(found):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        p = torch.cat([signals.solve_probability for signals in watch.met[part]]).double()
        q = torch.cat(priors[part])
        assert brier == pytest.approx(float((p * (1 - q) ** 2 + (1 - p) * q**2).mean()))
    assert len(found) == 2


@pytest.mark.parametrize("wrong", [PredictedDifficulty, "PredictedDifficulty", 0.5])
def test_a_predictor_of_another_kind_is_refused(wrong):
    for selector in (PredictedSelector(predictor=wrong), MiniRecSelector(signals="predicted", predictor=wrong)):
        with pytest.raises(InputError, match=r"Selector.predictor is .*: give an object of PredictedDifficulty"):
            MiniRec(selector=selector)


def test_what_a_selector_of_your_own_calls_predictor_is_its_own_affair(make_trainer, toy_path):
    selector = RandomSelector()
    selector.predictor = "of something else"
    trainer = make_trainer(callbacks=[MiniRec(48, selector=selector, curriculum="shuffled")], max_epochs=1)
    trainer.fit(module(), data(toy_path))
    assert session_of(trainer).predictor is None
