"""What reaches `training_step` is what the ledger and the plan say."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.slow import slow
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, Dataset

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RescoreSamples, RewardHistory, SelectSamples
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.selection import MiniRecSelector, RandomSelector, SampleSignals, SelectionLedger, SignalStore
from minirec_pl.selection.budget import budget_count, check_budget
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore:picked:UserWarning")


class Watch(Callback):
    """Notes the sample_ids of every training batch, and ledger, plan and easiness that each epoch began with."""

    def __init__(self):
        self.ids, self.plans, self.ledgers, self.easiness, self.folds = [], [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        session = session_of(trainer)
        self.ids.append([])
        self.plans.append(session.plan)
        self.folds.append(session.fold_starts)
        self.ledgers.append(session.ledger)
        self.easiness.append(None if session.plan is None else session.easiness(session.plan).tolist())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.ids:
            self.ids.append([])
        self.ids[-1] += batch["sample_id"].tolist()


class ReadsSteppingBatches(GRPORecModule):
    """As many user modules do, for a learning rate schedule."""

    def configure_optimizers(self):
        self.stepping_batches = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def module_of(policy, cls=GRPORecModule, **options):
    options = {"num_generations": 4, "scoring_generations": 4, **options}
    return cls(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05), **options)


def all_pass(**options):
    return MiniRecSelector(difficulty="pass_at_group", gate=(-1.0, 2.0), **options)


@pytest.mark.parametrize("num_workers", [0, slow(2)])
@pytest.mark.parametrize("cls", [GRPORecModule, ReadsSteppingBatches])
def test_training_step_gets_the_ledgers_plan(toy_data, tiny_policy, make_trainer, cls, num_workers):
    watch = Watch()
    minirec = MiniRec(0.3, rescore_fraction=0.5, selector=all_pass(), curriculum=EasyToHardCurriculum(n_folds=3))
    trainer = make_trainer(callbacks=[minirec, watch])
    data = toy_data(num_workers=num_workers)
    trainer.fit(module_of(tiny_policy(), cls), data)

    assert len(watch.ids) == 2
    for ids, plan, ledger, easiness, starts in zip(
        watch.ids, watch.plans, watch.ledgers, watch.easiness, watch.folds, strict=True
    ):
        assert ids == plan
        assert sorted(ids) == sorted(ledger.selected())
        assert len(ids) == int(0.3 * len(data.pool_ids))
        assert len(starts) == 3
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert easiness[start:end] == sorted(easiness[start:end], reverse=True)
    assert watch.ids[0] != watch.ids[1]


def test_an_unchanged_policy_keeps_its_plan_and_a_trained_one_does_not(toy_data, tiny_policy, make_trainer):
    def plans(lr):
        watch = Watch()
        module = GRPORecModule(
            tiny_policy(),
            num_generations=4,
            scoring_generations=0,
            optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        )
        minirec = MiniRec(0.3, rescore_fraction=1.0, selector=all_pass())
        make_trainer(callbacks=[minirec, watch]).fit(module, toy_data())
        return watch.plans

    first, second = plans(lr=0.0)
    assert first == second
    moved, later = plans(lr=5.0)
    assert moved == first
    assert later != moved


def test_callback_order_in_the_list_does_not_matter(toy_data, tiny_policy, make_trainer):
    def ids(order):
        parts = [
            RewardHistory(),
            RescoreSamples(0.25),
            SelectSamples(20, all_pass()),
            EasyToHardCurriculum(n_folds=2),
        ]
        watch = Watch()
        torch.manual_seed(3)
        make_trainer(callbacks=[parts[i] for i in order] + [watch]).fit(module_of(tiny_policy()), toy_data())
        return watch.ids

    torch.manual_seed(3)
    expected = ids([0, 1, 2, 3])
    assert [len(epoch) for epoch in expected] == [20, 20]
    assert ids([3, 2, 1, 0]) == expected


def test_minirec_equals_its_parts(toy_data, tiny_policy, make_trainer):
    def ids(callbacks):
        watch = Watch()
        torch.manual_seed(3)
        make_trainer(callbacks=[*callbacks, watch]).fit(module_of(tiny_policy()), toy_data())
        return watch.ids

    parts = [RewardHistory(), RescoreSamples(0.1), SelectSamples(0.2, all_pass()), EasyToHardCurriculum()]
    assert ids([MiniRec(0.2, selector=all_pass())]) == ids(parts)


def test_scoring_disturbs_neither_random_numbers_nor_modes(toy_data, tiny_policy, make_trainer):
    """Full budget, no reordering: the weights are those of a run without callbacks, bit for bit, dropout included."""

    def weights(callbacks):
        torch.manual_seed(3)
        module = module_of(tiny_policy(attention_dropout=0.3))
        make_trainer(callbacks=callbacks).fit(module, toy_data())
        return module.policy.state_dict()

    plain, scored = weights([]), weights([RescoreSamples(1.0)])
    assert all(torch.equal(plain[name], scored[name]) for name in plain)


def test_first_pass_scores_the_whole_pool_and_later_ones_the_stalest(toy_data, tiny_policy, make_trainer):
    clocks = []

    class Clocks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            clocks.append(session_of(trainer).store.clock("gradient_epoch"))

    data = toy_data()
    minirec = MiniRec(0.2, rescore_fraction=0.25, selector=all_pass())
    make_trainer(callbacks=[minirec, Clocks()], max_epochs=5).fit(module_of(tiny_policy()), data)
    n = len(data.pool_ids)
    assert (clocks[0] == 0).all()
    assert int((clocks[1] == 1).sum()) == round(0.25 * n)
    assert int((clocks[4] == 0).sum()) <= n - 4 * round(0.25 * n) + 4
    assert clocks[4].unique().tolist()[-4:] == [1, 2, 3, 4]


def test_a_random_part_is_scored_first_and_more_of_the_pool_each_epoch(toy_data, tiny_policy, make_trainer):
    scored, picked = [], []

    class Clocks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            session = session_of(trainer)
            ids = session.store.sample_ids
            scored.append(set(ids[session.store.clock("gradient_epoch") >= 0].tolist()))
            picked.append(set(session.selected))

    data = toy_data()
    minirec = MiniRec(0.1, rescore_fraction=0.25, selector=all_pass(), score_fraction=0.25)
    make_trainer(callbacks=[minirec, Clocks()], max_epochs=3).fit(module_of(tiny_policy()), data)
    n = len(data.pool_ids)
    assert len(scored[0]) == math.ceil(0.25 * n)
    assert [len(more - less) for less, more in itertools.pairwise(scored)] == [round(0.25 * n)] * 2
    assert all(len(picks) == int(0.1 * n) and picks <= known for picks, known in zip(picked, scored, strict=True))
    assert any(picks - scored[0] for picks in picked[1:])
    ranks = sorted(data.pool_ids.tolist().index(sample) for sample in scored[0])
    assert n / 3 < ranks[len(ranks) // 2] < 2 * n / 3, "the part is not spread over the pool"


def test_rewards_met_in_training_reach_the_store(toy_data, tiny_policy, make_trainer):
    seen = {}

    class Rewards(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.update(zip(batch["sample_id"].tolist(), outputs["signals"].rewards.mean(dim=1).tolist(), strict=True))

    trainer = make_trainer(callbacks=[RewardHistory(), Rewards()], max_epochs=1)
    trainer.fit(module_of(tiny_policy()), toy_data())
    store = session_of(trainer).store
    stored = store.read(list(seen))
    assert stored.reward_mean.tolist() == pytest.approx(list(seen.values()))
    assert (stored.n_rollouts == 4).all()
    assert (store.clock("reward_step") >= 0).all()


def test_run_folder_gets_ledger_signals_and_picture(toy_data, tiny_policy, make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[MiniRec(12, selector=all_pass())])
    trainer.fit(module_of(tiny_policy()), toy_data())
    folder = tmp_path / "run"
    ledger = SelectionLedger.from_parquet(folder / "ledger.parquet")
    assert len(ledger.selected()) == 12
    assert ledger.selected() == session_of(trainer).ledger.selected()
    assert (folder / "signals.safetensors").is_file()
    assert (folder / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_a_fixed_ledger_is_trained_on_as_it_is(toy_data, tiny_policy, make_trainer, tmp_path):
    first = make_trainer(callbacks=[MiniRec(12, selector=all_pass())], max_epochs=1)
    first.fit(module_of(tiny_policy()), toy_data())
    path = str(tmp_path / "run" / "ledger.parquet")
    chosen = SelectionLedger.from_parquet(path).selected()

    watch = Watch()
    make_trainer(callbacks=[SelectSamples(ledger=path), watch], default_root_dir=tmp_path / "b").fit(
        module_of(tiny_policy()), toy_data()
    )
    assert [sorted(ids) for ids in watch.ids] == [sorted(chosen)] * 2
    assert watch.ids[0] != watch.ids[1]

    watch = Watch()
    make_trainer(callbacks=[SelectSamples(5, ledger=path), watch], default_root_dir=tmp_path / "c").fit(
        module_of(tiny_policy()), toy_data()
    )
    assert sorted(watch.ids[0]) == sorted(chosen[:5])


def test_warmup_trains_on_the_whole_pool_and_every_n_keeps_a_selection(toy_data, tiny_policy, make_trainer):
    watch = Watch()
    data = toy_data()
    minirec = MiniRec(
        10, warmup_epochs=1, every_n_epochs=2, selector=RandomSelector(redraw=True), curriculum="shuffled"
    )
    make_trainer(callbacks=[minirec, watch], max_epochs=5).fit(module_of(tiny_policy()), data)
    sets = [sorted(ids) for ids in watch.ids]
    assert sets[0] == sorted(data.pool_ids.tolist())
    assert [len(ids) for ids in sets[1:]] == [10] * 4
    assert sets[1] == sets[2] != sets[3] == sets[4]


def test_random_selection_costs_no_scoring(toy_data, tiny_policy, make_trainer):
    module = module_of(tiny_policy())
    minirec = MiniRec(0.1, selector=RandomSelector(), curriculum="shuffled")
    make_trainer(callbacks=[minirec]).fit(module, toy_data())
    assert module.cost.tokens_forward["scoring"] == 0
    assert module.cost.rollouts["scoring"] == 0
    assert module.cost.rollouts["training"] > 0


def test_scoring_is_charged(toy_data, tiny_policy, make_trainer):
    module = module_of(tiny_policy())
    data = toy_data()
    make_trainer(callbacks=[MiniRec(0.1, selector=all_pass())], max_epochs=1).fit(module, data)
    assert module.cost.rollouts["scoring"] == 4 * len(data.pool_ids)
    assert module.cost.tokens_forward["scoring"] > 0
    assert module.cost.seconds["scoring"] > 0
    assert module.cost.seconds["selection"] > 0


def test_official_mode_measures_hessian_vector_products(toy_data, tiny_policy, make_trainer):
    trainer = make_trainer(callbacks=[MiniRec(8, selector=MiniRecSelector(mode="official"))], max_epochs=1)
    module = module_of(tiny_policy())
    kinds = []
    measure = module.sample_signals
    module.sample_signals = lambda batch, gradient="first": kinds.append(gradient) or measure(batch, gradient)
    trainer.fit(module, toy_data())
    assert set(kinds) == {"hvp"}


@pytest.mark.slow
@pytest.mark.parametrize("space", ["answer", "lora"])
def test_trajectory_is_known_of_the_samples_scored_again(toy_data, tiny_policy, make_trainer, tmp_path, space):
    selector = all_pass(gradient="trajectory", gradient_space=space)
    trainer = make_trainer(callbacks=[MiniRec(0.3, rescore_fraction=0.5, selector=selector)], max_epochs=3)
    data = toy_data(warm_fraction=0.5)
    trainer.fit(module_of(tiny_policy(), scoring_generations=0), data)
    store = session_of(trainer).store
    n, ages = len(data.pool_ids), store.clock("alignment_epoch")
    assert int((ages == 1).sum()) == n - int((ages == 2).sum())
    assert int((ages == 2).sum()) == round(0.5 * n)
    assert (store.clock("gradient_epoch") == ages).all()
    view = store.pool_view(2)
    assert view.gradient.shape[1] == {"answer": 16, "lora": 512}[space]
    ledger = SelectionLedger.from_parquet(tmp_path / "run" / "ledger.parquet").rows(view.sample_id.tolist())
    r = (1 + view.alignment) / 2
    expected = (r - r.min()) / (r.max() - r.min())
    np.testing.assert_allclose(ledger["representativeness"], expected, atol=1e-9)
    assert expected.std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("space", ["answer", "lora"])
def test_a_resumed_run_follows_the_same_trajectory(toy_data, tiny_policy, make_trainer, tmp_path, space):
    def fit(epochs, ckpt_path=None):
        torch.manual_seed(3)
        module = module_of(tiny_policy(), scoring_generations=0)
        selector = all_pass(gradient="trajectory", gradient_space=space)
        trainer = make_trainer(callbacks=[MiniRec(0.2, selector=selector)], max_epochs=epochs)
        trainer.fit(module, toy_data(), ckpt_path=ckpt_path)
        return trainer, module

    whole, expected = fit(4)
    stopped, _ = fit(2)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed, module = fit(4, tmp_path / "half.ckpt")
    assert session_of(resumed).store.digest() == session_of(whole).store.digest()
    weights = expected.policy.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in module.policy.state_dict().items())


def test_pass_at_group_takes_the_group_size_of_the_module_and_leaves_the_selector_alone(
    toy_data, tiny_policy, make_trainer
):
    selector = all_pass()
    trainer = make_trainer(callbacks=[MiniRec(8, selector=selector)], max_epochs=1)
    trainer.fit(module_of(tiny_policy(), scoring_generations=0), toy_data())
    assert selector.num_generations is None
    ids = session_of(trainer).ledger.selected()
    difficulty = session_of(trainer).ledger.rows(ids)["difficulty"].to_numpy()
    path = Path(trainer.default_root_dir) / "signals.safetensors"
    p = SignalStore.load(path).read(ids).solve_probability.numpy()
    assert difficulty == pytest.approx(1 - (1 - p) ** 4)


def test_exact_probabilities_order_the_plan_where_no_rollouts_are_drawn(toy_data, tiny_policy, make_trainer):
    """Rewards met in training must not outlive a re-score, nor be mixed with probabilities."""
    watch = Watch()
    minirec = MiniRec(30, rescore_fraction=1.0, selector=all_pass(), curriculum=EasyToHardCurriculum(n_folds=1))
    trainer = make_trainer(callbacks=[minirec, watch], max_epochs=3)
    probabilities = []

    class Probabilities(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            session = session_of(trainer)
            probabilities.append(session.store.read(session.plan).solve_probability.tolist())

    trainer.callbacks.append(Probabilities())
    trainer.fit(module_of(tiny_policy(), scoring_generations=0), toy_data())
    for values, easiness in zip(probabilities, watch.easiness, strict=True):
        assert values == easiness == sorted(values, reverse=True)


def test_a_second_fit_scores_the_pool_anew(toy_data, tiny_policy, make_trainer):
    trainer = make_trainer(callbacks=[MiniRec(8, selector=all_pass())], max_epochs=1)
    data, module = toy_data(), module_of(tiny_policy())
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert (session_of(trainer).store.clock("gradient_epoch") >= 0).all()
    assert module.cost.rollouts["scoring"] == 2 * 4 * len(data.pool_ids)


def test_max_steps_is_not_followed_by_scoring(toy_data, tiny_policy, make_trainer):
    module, data = module_of(tiny_policy()), toy_data()
    make_trainer(callbacks=[MiniRec(8, rescore_fraction=1.0, selector=all_pass())], max_epochs=-1, max_steps=1).fit(
        module, data
    )
    assert module.cost.rollouts["scoring"] == 4 * len(data.pool_ids)


def test_scoring_keeps_to_the_batch_size_of_a_foreign_loader(make_trainer):
    sizes = []

    class Sizes(Foreign):
        def sample_signals(self, batch):
            sizes.append(len(batch["sample_id"]))
            return super().sample_signals(batch)

    make_trainer(callbacks=[MiniRec(10)], max_epochs=1).fit(Sizes(CurriculumSampler(range(40))))
    assert set(sizes) == {4}


def test_a_gate_that_nothing_passes_any_more_keeps_the_last_selection(make_trainer):
    class Solved(Foreign):
        def sample_signals(self, batch):
            signals = super().sample_signals(batch)
            if self.trainer.current_epoch > 0 or self.met:
                signals.rewards = torch.ones_like(signals.rewards)
            return signals

    watch = Watch()
    module = Solved(CurriculumSampler(range(40)))
    with pytest.warns(UserWarning, match="epoch 2 keeps the selection of the epoch before: none of 40"):
        make_trainer(callbacks=[MiniRec(10, rescore_fraction=1.0), watch]).fit(module)
    assert sorted(watch.ids[0]) == sorted(watch.ids[1])


def test_resume_at_an_epochs_end_goes_on_as_if_never_stopped(toy_data, tiny_policy, make_trainer, tmp_path):
    def fit(epochs, ckpt_path=None):
        watch = Watch()
        torch.manual_seed(3)
        module = module_of(tiny_policy())
        trainer = make_trainer(
            callbacks=[MiniRec(0.2, rescore_fraction=0.5, selector=all_pass()), watch], max_epochs=epochs
        )
        trainer.fit(module, toy_data(), ckpt_path=ckpt_path)
        return trainer, module, watch

    _, whole, watched = fit(4)
    stopped, _, _ = fit(2)
    path = tmp_path / "half.ckpt"
    stopped.save_checkpoint(path)
    _, resumed, watched_after = fit(4, path)
    assert watched_after.ids == watched.ids[2:]
    expected = whole.policy.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy.state_dict().items())
    assert resumed.cost.rollouts == whole.cost.rollouts
    assert resumed.cost.tokens_forward == whole.cost.tokens_forward


@pytest.mark.parametrize("num_workers", [0, slow(2)])
def test_resume_inside_an_epoch_goes_on_as_if_never_stopped(toy_data, tiny_policy, make_trainer, tmp_path, num_workers):
    path = tmp_path / "inside.ckpt"

    class SaveAt(Callback):
        def __init__(self, step):
            self.step = step

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == self.step:
                trainer.save_checkpoint(path)

    def fit(ckpt_path=None, extra=()):
        watch = Watch()
        torch.manual_seed(3)
        module = module_of(tiny_policy())
        minirec = MiniRec(40, rescore_fraction=0.5, selector=all_pass())
        trainer = make_trainer(callbacks=[minirec, watch, *extra], max_epochs=3)
        trainer.fit(module, toy_data(num_workers=num_workers), ckpt_path=ckpt_path)
        return module, watch

    whole, watched = fit(extra=[SaveAt(7)])
    resumed, after = fit(path)
    assert after.ids[-1] == watched.ids[-1]
    expected = whole.policy.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy.state_dict().items())


class Squares(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"sample_id": index, "x": torch.tensor([float(index)])}


class Foreign(LightningModule):
    """A user's module: knows nothing of us but `sample_signals`."""

    def __init__(self, sampler):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.sampler = sampler
        self.met = []

    def train_dataloader(self):
        return DataLoader(Squares(), batch_size=4, sampler=self.sampler)

    def training_step(self, batch, batch_idx):
        self.met += batch["sample_id"].tolist()
        return self.layer(batch["x"]).square().mean()

    def sample_signals(self, batch):
        x = batch["x"] / 40
        return SampleSignals(
            batch["sample_id"], rewards=x.expand(-1, 2), gradient=x + 1, embedding=torch.cat([x, 1 - x], 1)
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_a_foreign_module_trains_on_the_selection(make_trainer):
    module = Foreign(CurriculumSampler(range(40)))
    make_trainer(callbacks=[MiniRec(10, curriculum=EasyToHardCurriculum(n_folds=1))], max_epochs=1).fit(module)
    assert len(module.met) == 10
    assert module.met == sorted(module.met, reverse=True)
    assert all(0.05 <= i / 40 <= 0.95 for i in module.met)


def test_a_new_sampler_at_each_call_is_refused(make_trainer):
    class Forgetful(Foreign):
        def train_dataloader(self):
            return DataLoader(Squares(), batch_size=4, sampler=CurriculumSampler(range(40)))

    with pytest.raises(InputError, match="keep one CurriculumSampler"):
        make_trainer(callbacks=[MiniRec(10)], max_epochs=1).fit(Forgetful(None))


def test_a_module_that_cannot_be_scored_is_told_what_to_define(make_trainer):
    class Mute(Foreign):
        sample_signals = None

    with pytest.raises(InputError, match=r"Mute cannot be scored: define `sample_signals"):
        make_trainer(callbacks=[MiniRec(10)], max_epochs=1).fit(Mute(CurriculumSampler(range(40))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": -0.1}, "budget is -0.1"),
        ({"budget": 1.5}, "budget is 1.5, a fraction above 1: give at most 1.0"),
        ({"budget": float("inf")}, "budget is inf, a fraction above 1: give at most 1.0"),
        ({"budget": True}, "budget is True"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"rescore_fraction": 1.1}, "rescore_fraction is 1.1"),
        ({"score_fraction": 0.0}, "score_fraction is 0.0"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"every_n_epochs": 0}, "every_n_epochs 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, words):
    with pytest.raises(InputError, match=words):
        MiniRec(**options)


@pytest.mark.parametrize(
    ("budget", "count"), [(0.1, 5), (0.001, 1), (1.0, 50), (1, 1), (20, 20), (20.0, 20), (None, 50)]
)
def test_what_a_budget_means_in_a_pool_of_50(budget, count):
    check_budget(budget)
    found = budget_count(budget, 50)
    assert found == count
    assert isinstance(found, int)


def test_a_budget_above_the_pool_is_refused(toy_data, tiny_policy, make_trainer):
    data = toy_data()
    with pytest.raises(InputError, match="budget is 100000 samples but the pool has"):
        make_trainer(callbacks=[MiniRec(100_000)]).fit(module_of(tiny_policy()), data)


def test_selecting_without_scores_is_refused(toy_data, tiny_policy, make_trainer):
    with pytest.raises(InputError, match="add the callback RescoreSamples"):
        make_trainer(callbacks=[SelectSamples(0.1)]).fit(module_of(tiny_policy()), toy_data())


def test_two_callbacks_for_one_phase_are_refused(toy_data, tiny_policy, make_trainer):
    with pytest.raises(InputError, match="two callbacks of one Trainer are responsible for the phase 'select'"):
        make_trainer(callbacks=[MiniRec(0.1), SelectSamples(0.2)]).fit(module_of(tiny_policy()), toy_data())


def test_a_ledger_of_another_pool_is_refused(toy_data, tiny_policy, make_trainer, tmp_path):
    first = make_trainer(callbacks=[MiniRec(12, selector=all_pass())], max_epochs=1)
    first.fit(module_of(tiny_policy()), toy_data())
    table = SelectionLedger.from_parquet(tmp_path / "run" / "ledger.parquet").table.copy()
    table["sample_id"] += 100_000
    path = SelectionLedger(table).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"outside the pool|not in the pool"):
        make_trainer(callbacks=[SelectSamples(None, ledger=str(path))]).fit(module_of(tiny_policy()), toy_data())


def test_last_epoch_is_not_followed_by_scoring(toy_data, tiny_policy, make_trainer):
    module = module_of(tiny_policy())
    data = toy_data()
    make_trainer(callbacks=[MiniRec(8, rescore_fraction=1.0, selector=all_pass())], max_epochs=2).fit(module, data)
    assert module.cost.rollouts["scoring"] == 2 * 4 * len(data.pool_ids)


def test_signals_of_a_run_can_be_read_back(toy_data, tiny_policy, make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[MiniRec(8, selector=all_pass())], max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        trainer.fit(module_of(tiny_policy()), toy_data())
    store = SignalStore.load(tmp_path / "run" / "signals.safetensors")
    view = store.pool_view(0)
    assert np.array_equal(view.sample_id.numpy(), np.sort(store.sample_ids.numpy()))
    assert view.gradient.shape == view.embedding.shape == (len(store), 16)
    assert not view.solve_probability.isnan().any()
