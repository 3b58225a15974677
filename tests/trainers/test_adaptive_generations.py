"""`adaptive_generations` through a real Trainer: sizes and budget by plain loops, ranks, and resume bit for bit."""

import copy
import math
import warnings

import pandas as pd
import pytest
import torch
from helpers.plain_policy import PlainPolicy
from helpers.slow import slow
from helpers.text_policy import text_policy, write_model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import CompletionsTable, MiniRec, RewardHistory, SelectSamples
from minirec_pl.grpo import AdaptiveGenerations
from minirec_pl.selection import FullSelector, KMeansSelector, MiniRecSelector, PredictedSelector, RandomSelector
from minirec_pl.selection.group_sizes import GroupSizer, GroupSizes, generations_needed, met_chance
from minirec_pl.selection.selectors.picks import best_first, ledger_of
from minirec_pl.selection.session.session import session_of
from minirec_pl.selection.signals import Signals

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples
GROUP = 4
ADAPTIVE = AdaptiveGenerations(q=0.7, max=12)


def sometimes(completions, sample_id, recommended):
    """Hit or miss: some samples are always solved, some never, the others by every third or other item."""
    return [
        [1.0, 0.0, float(int(item[1:]) % 3 == 0), float(int(item[1:]) % 2)][i % 4]
        for item, i in zip(recommended, sample_id, strict=True)
    ]


class Middle:
    """A selector of a user's own: those whose mean reward is nearest a half."""

    needs = frozenset({"rewards"})

    def select(self, signals, k, *, epoch=0):
        value = -(signals.reward_mean - 0.5).abs()
        return ledger_of(signals, best_first(value, k), k, {"value": value}, {})


SELECTIONS = {
    "random": lambda: MiniRec(20, selector=RandomSelector(redraw=True), curriculum="shuffled"),
    "random, three epochs": lambda: MiniRec(20, selector=RandomSelector(), curriculum="shuffled", every_n_epochs=3),
    "minirec": lambda: MiniRec(20, selector=MiniRecSelector(gate=(-1.0, 2.0))),
    "own": lambda: MiniRec(20, selector=Middle()),
    "kmeans": lambda: MiniRec(0.25, selector=KMeansSelector()),
    "warm-up": lambda: MiniRec(20, selector=Middle(), warmup_epochs=1),
    "full": lambda: MiniRec(20, selector=FullSelector()),
    "no selection": RewardHistory,
}
BUDGET = {"kmeans": 19, "full": 77, "no selection": 77}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def module_of(policy, **options):
    given = {"num_generations": GROUP, "optimizer": sgd, "adaptive_generations": ADAPTIVE, "scoring_generations": 2}
    return GRPORecModule(policy, [sometimes], **{**given, **options})


class Watch(Callback):
    """Notes what was known at the start of each epoch, its plan, and all rollouts."""

    def __init__(self):
        self.known, self.sizes, self.plans, self.steps, self.ids = [], [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        session = session_of(trainer)
        self.ids = session.store.sample_ids.tolist()
        view = session.store.read(session.store.sample_ids, vectors=False)
        exact = [math.nan] * len(view) if view.solve_probability is None else view.solve_probability.tolist()
        self.known.append([*zip(exact, view.solve_share.tolist(), view.n_rollouts.tolist(), strict=True)])
        self.sizes.append(dict(zip(self.ids, session.group_sizes.tolist(), strict=True)))
        plan = session.plan
        self.plans.append(self.ids if plan is None else list(plan))
        self.steps.append([])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps[-1].append(copy.deepcopy(pl_module.generation.at(pl_module.generation.position)))

    def drawn(self, epoch):
        """Rollouts of each sample in an epoch."""
        found = {}
        for rollouts in self.steps[epoch]:
            found |= dict(zip(rollouts.batch["sample_id"].tolist(), rollouts.exists.sum(dim=1).tolist(), strict=True))
        return found


def plain_size(p, adaptive=ADAPTIVE):
    """Rollouts of a sample; None where nothing is known of it, 0 where it would need more than allowed."""
    if math.isnan(p):
        return None
    for size in range(2, adaptive.max + 1):
        if 1 - p**size - (1 - p) ** size >= adaptive.q:
            return size
    return 0


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_sample_gets_the_rollouts_that_it_needs(name, tiny_policy, toy_data, make_trainer):
    watch, module = Watch(), module_of(tiny_policy())
    trainer = make_trainer(max_epochs=3, callbacks=[watch, SELECTIONS[name]()])
    trainer.fit(module, toy_data(**SMALL))
    seen, explored = set(), 0
    for epoch, known in enumerate(watch.known):
        truth = [plain_size((share * n + 0.5) / (n + 1) if n else math.nan) for _, share, n in known]
        sizes = watch.sizes[epoch]
        for sample_id, size in zip(watch.ids, truth, strict=True):
            if size == 0 and sizes[sample_id] == GROUP:
                explored += 1
            else:
                assert sizes[sample_id] == (GROUP if size is None else size)
        plan, drawn = watch.plans[epoch], watch.drawn(epoch)
        assert sorted(drawn) == sorted(plan)
        assert drawn == {sample_id: sizes[sample_id] for sample_id in plan}
        seen |= set(drawn.values())
        budget = GROUP * (77 if name == "warm-up" and epoch == 0 else BUDGET.get(name, 20))
        eligible = sum(sizes.values())
        spent = sum(drawn.values())
        assert spent < budget + ADAPTIVE.max
        if name not in ("random, three epochs", "kmeans"):
            assert spent >= min(budget, eligible)
    assert len(seen) > 1
    assert explored < 30
    drawn_in_all = sum(sum(watch.drawn(epoch).values()) for epoch in range(3))
    assert module.cost.rollouts["training"] == drawn_in_all


def test_a_hit_goes_by_the_exact_probability_of_the_target(tiny_policy, toy_data, make_trainer):
    adaptive = AdaptiveGenerations(q=0.1, max=12)
    module = GRPORecModule(tiny_policy(), num_generations=GROUP, adaptive_generations=adaptive, scoring_generations=0)
    watch = Watch()
    selection = MiniRec(20, selector=MiniRecSelector(difficulty="pass_at_group", gate=(-1.0, 2.0)))
    make_trainer(max_epochs=2, callbacks=[watch, selection]).fit(module, toy_data(**SMALL))
    for epoch, known in enumerate(watch.known):
        for sample_id, size in watch.drawn(epoch).items():
            needed = plain_size(known[watch.ids.index(sample_id)][0], adaptive)
            assert size == needed or (needed == 0 and size == GROUP)
        assert len(set(watch.drawn(epoch).values())) > 2


def test_groups_are_mixed_as_often_as_their_sizes_promise(tiny_policy, toy_data, make_trainer):
    adaptive = AdaptiveGenerations(q=0.6, max=120)
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "scoring_generations": 0}
    module = GRPORecModule(tiny_policy(), num_generations=GROUP, adaptive_generations=adaptive, **still)
    watch = Watch()
    selection = MiniRec(77, selector=MiniRecSelector(difficulty="pass_at_group", gate=(-1.0, 2.0)))
    make_trainer(max_epochs=2, callbacks=[watch, selection]).fit(module, toy_data(**SMALL))
    p_of = dict(zip(watch.ids, (exact for exact, _, _ in watch.known[0]), strict=True))
    mixed, expected, variance = 0, 0.0, 0.0
    for rollouts in watch.steps[0] + watch.steps[1]:
        mixed += int((~rollouts.flat).sum())
        sizes = rollouts.exists.sum(dim=1).tolist()
        for sample_id, size in zip(rollouts.batch["sample_id"].tolist(), sizes, strict=True):
            p = p_of[sample_id]
            chance = 1 - p**size - (1 - p) ** size
            expected, variance = expected + chance, variance + chance * (1 - chance)
    assert expected > 5
    assert mixed == pytest.approx(expected, abs=4 * variance**0.5)


def test_a_policy_that_reasons_trains_on_unequal_groups(toy_data, make_trainer, tmp_path):
    data = toy_data(history_window=3, **SMALL, batch_size=4)
    data.setup("fit")
    policy = text_policy(write_model(tmp_path / "llama"), catalogue=data.catalogue, max_completion_length=4)
    module = module_of(policy, beta=0.05, relabel_topk=2)
    before = copy.deepcopy(policy.state_dict())
    watch = Watch()
    trainer = make_trainer(max_epochs=2, callbacks=[watch, MiniRec(8, selector=Middle()), CompletionsTable(1)])
    trainer.fit(module, data)
    drawn = watch.drawn(0) | watch.drawn(1)
    assert len(set(drawn.values())) > 1
    assert module.cost.rollouts["training"] == sum(watch.drawn(0).values()) + sum(watch.drawn(1).values())
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    shown = pd.read_parquet(tmp_path / "run" / "completions.parquet")
    sizes = shown.groupby(["step", "sample_id"]).size()
    for (_, sample_id), size in sizes.items():
        assert size in {watch.drawn(epoch).get(sample_id) for epoch in range(2)}


def test_only_as_much_of_a_ranking_as_the_budget_pays_for():
    sizer = GroupSizer(GROUP, ADAPTIVE)
    groups = GroupSizes(torch.arange(10), torch.tensor([4, 0, 2, 9, 3, 0, 2, 2, 12, 5]), sizer)
    assert groups.within_budget([3, 1, 8, 2], 1) == [3]
    assert groups.within_budget([2, 1, 6, 4, 8, 0], 2) == [2, 6, 4, 8]
    assert groups.within_budget([9, 8, 7], 50) == [9, 8, 7]
    with pytest.raises(InputError, match=r"each of the 2 samples to train on needs more than adaptive_generations.max"):
        groups.within_budget([1, 5], 3)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.8, 0.99])
def test_the_smallest_group_that_is_mixed_often_enough(q):
    p = torch.cat([torch.linspace(0, 1, 201, dtype=torch.float64), torch.tensor([0.5, 1e-9, 1 - 1e-9])])
    truth = []
    for chance in p.tolist():
        fitting = [g for g in range(2, 33) if 1 - chance**g - (1 - chance) ** g >= q + 1e-12]
        nearly = [g for g in range(2, 33) if 1 - chance**g - (1 - chance) ** g >= q - 1e-12]
        truth.append({min(fitting, default=0), min(nearly, default=0)})
    assert all(size in sizes for size, sizes in zip(generations_needed(p, q, 32).tolist(), truth, strict=True))


def test_a_share_of_what_needs_too_much_is_explored_and_drawn_anew_each_epoch():
    sizer, chance = GroupSizer(8, AdaptiveGenerations(0.8, 64)), torch.zeros(20_000, dtype=torch.float64)
    first, again, later = (sizer.sizes(chance, 3, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert set(first.tolist()) == {0, 8}
    for sizes in (first, later):
        assert float((sizes > 0).double().mean()) == pytest.approx(0.05, abs=0.006)  # 4 standard errors
    both = float(((first > 0) & (later > 0)).double().mean())
    assert both == pytest.approx(0.0025, abs=0.0015)


def test_a_few_misses_make_no_sample_hopeless():
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    share = torch.tensor([0.0, 0.0, 1.0, math.nan], dtype=torch.float64)
    counts = torch.tensor([8, 100, 8, 0])
    signals = Signals(torch.arange(4), nothing, nothing, counts, solve_share=share)
    assert met_chance(signals).tolist()[:3] == pytest.approx([0.5 / 9, 0.5 / 101, 8.5 / 9])
    assert GroupSizer(8, AdaptiveGenerations(0.8, 64)).sizes(met_chance(signals), 0, 0).tolist()[::2] == [29, 29]
    signals.solve_probability = torch.tensor([0.5, math.nan, 0.5, math.nan], dtype=torch.float64)
    assert met_chance(signals).tolist()[:3] == pytest.approx([0.5, 0.5 / 101, 0.5])
    assert math.isnan(float(met_chance(signals)[3]))


def test_groups_are_sized_by_the_posterior_where_the_solve_probability_is_predicted(
    tiny_policy, toy_data, make_trainer
):
    class Posterior(Callback):
        def __init__(self):
            self.chances = []

        def on_train_epoch_start(self, trainer, pl_module):
            store = session_of(trainer).store
            ids = store.sample_ids
            self.chances.append(dict(zip(ids.tolist(), store.posterior_mean(ids).tolist(), strict=True)))

    watch, posterior = Watch(), Posterior()
    selection = MiniRec(0.5, selector=PredictedSelector(gate=(0.0, 1.0)))
    trainer = make_trainer(max_epochs=3, callbacks=[watch, posterior, selection])
    module = module_of(tiny_policy())
    trainer.fit(module, toy_data(**SMALL))
    assert not module.cost.tokens_forward["scoring"]
    assert set(watch.drawn(0).values()) == {GROUP}  # nothing has been met yet
    for epoch in (1, 2):
        drawn, chance = watch.drawn(epoch), posterior.chances[epoch]
        assert len(set(drawn.values())) > 2
        assert all(size == (plain_size(chance[sample_id]) or GROUP) for sample_id, size in drawn.items())


def hopeless(completions, sample_id):
    """One sample in four is hit by every third rollout, the others never."""
    return [float(i % 4 == 0 and place % 3 == 0) for place, i in enumerate(sample_id)]


def test_a_budget_that_too_few_samples_can_spend_is_said(tiny_policy, toy_data, make_trainer):
    watch = Watch()
    module = GRPORecModule(tiny_policy(), [hopeless], num_generations=GROUP, adaptive_generations=ADAPTIVE)
    trainer = make_trainer(callbacks=[MiniRec(1.0, selector=PredictedSelector()), watch], max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, toy_data(**SMALL))
    said = [str(warning.message) for warning in caught if "rollouts of the budget" in str(warning.message)]
    left = [sum(size == 0 for size in sizes.values()) for sizes in watch.sizes]
    spent = [sum(sizes.values()) / (77 * GROUP) for sizes in watch.sizes]
    first = next(epoch for epoch in range(3) if left[epoch] and spent[epoch] < 1)
    assert said == [
        f"{left[first]} of 77 samples need more than 12 rollouts and are left out, so that the epoch has "
        f"{spent[first]:.0%} of the rollouts of the budget: raise adaptive_generations.max, lower "
        "adaptive_generations.q, or lower the budget"
    ]


@pytest.mark.parametrize("options", [{}, {"warmup_epochs": 1}, {"every_n_epochs": 2}])
def test_groups_are_sized_once_for_each_epoch(options, tiny_policy, toy_data, make_trainer, monkeypatch):
    asked, sizes = [], GroupSizer.sizes
    monkeypatch.setattr(GroupSizer, "sizes", lambda self, *given: asked.append(given[-1]) or sizes(self, *given))
    selection = MiniRec(20, selector=PredictedSelector(), **options)
    make_trainer(callbacks=[selection], max_epochs=4).fit(module_of(tiny_policy()), toy_data(**SMALL))
    assert asked == [0, 1, 2, 3]


def weighted_gradient(policy, parts):
    """Of DAPO's loss, tokens of a group counting 1 / its size; parts are dictionaries."""
    plain, total, tokens = PlainPolicy(policy), 0.0, 0.0
    for part in parts:
        for b, size in enumerate(part["group_size"].tolist()):
            history, seen = ([i for i in part[key][b].tolist() if i >= 0] for key in ("history", "seen"))
            items, rewards = part["items"][b, :size].tolist(), part["rewards"][b, :size].double()
            tokens += sum(len(plain.ids[item]) for item in items) / size
            if rewards.std() > 0:
                advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
                logps = [plain.item_logp(history, seen, item) for item in items]
                total = total - sum(a * logp for a, logp in zip(advantages, logps, strict=True)) / size
    (total / tokens).backward()
    return [p.grad for p in plain.model.parameters()]


class Ranks(Callback):
    """Writes the sizes, and the micro-batches and gradient of each step, by rank."""

    def __init__(self, folder):
        self.folder, self.parts, self.steps, self.sizes = folder, [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.sizes.append(session_of(trainer).group_sizes)

    def on_before_backward(self, trainer, pl_module, loss):
        rollouts = pl_module.generation.at(pl_module.generation.position)
        self.parts.append({"items": rollouts.items, "rewards": rollouts.rewards, **rollouts.batch})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        weights = copy.deepcopy(pl_module.policy.state_dict())
        self.steps.append((self.parts, [p.grad.clone() for p in pl_module.policy.parameters()], weights))
        self.parts = []

    def on_fit_end(self, trainer, pl_module):
        torch.save((self.sizes, self.steps), self.folder / f"rank-{trainer.global_rank}.pt")


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_accumulated_batches_on_ranks_have_the_gradient_of_all_their_groups(
    n_ranks, policy, toy_data, make_trainer, tmp_path
):
    module = module_of(policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), scoring_generations=0)
    options = {"strategy": "ddp_fork", "devices": 2} if n_ranks == 2 else {}
    trainer = make_trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[Ranks(tmp_path), SELECTIONS["random"]()], **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, toy_data(**SMALL, batch_size=6))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(n_ranks)]
    for sizes, _ in ranks[1:]:
        assert all(torch.equal(mine, other) for mine, other in zip(sizes, ranks[0][0], strict=True))
    step = -2 if n_ranks == 1 else -1
    parts = [part for _, steps in ranks for part in steps[step][0]]
    assert len({size for part in parts for size in part["group_size"].tolist()}) > 1
    truth = weighted_gradient(policy, parts)
    for _, steps in ranks:
        for mine, wanted in zip(steps[step][1], truth, strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=2e-3, atol=2e-5)
    assert max(float(gradient.abs().max()) for gradient in truth) > 1e-3


class SaveAt(Callback):
    """Saves a checkpoint after some batch."""

    def __init__(self, path, batch):
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [1, 4, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"num_iterations": 2, "steps_per_generation": 2}),
        slow({"wasted_groups": "dynamic_sampling", "oversample": 2.0}),
    ],
)
def test_a_run_resumes_bit_for_bit(at, options, tiny_policy, toy_data, make_trainer, tmp_path):
    def run(callbacks, ckpt=None):
        torch.manual_seed(3)
        module = module_of(tiny_policy(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **options)
        trainer = make_trainer(max_epochs=3, callbacks=[SELECTIONS["random"](), *callbacks])
        trainer.fit(module, toy_data(**SMALL, batch_size=5), ckpt_path=ckpt)
        session = session_of(trainer)
        return module.state_dict(), session.store.digest(), session.group_sizes, session.plan, module.cost.rollouts

    whole = run([SaveAt(tmp_path / "at.ckpt", at)])
    resumed = run([], str(tmp_path / "at.ckpt"))
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    assert whole[1] == resumed[1]
    assert torch.equal(whole[2], resumed[2])
    assert whole[3:] == resumed[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": "beam"}, "rollouts is 'beam', and adaptive_generations .* set rollouts to sample"),
        ({"rollouts": "expected"}, "rollouts is 'expected', and adaptive_generations"),
        ({"distinct_rollouts": True}, "distinct_rollouts is true, and adaptive_generations"),
        ({"scale_rewards": "batch"}, "scale_rewards is 'batch', .*: set scale_rewards to group, mean or none"),
        ({"adaptive_generations": {"q": 0.8}}, r"adaptive_generations is {'q': 0.8}: give minirec_pl.grpo.Adaptive"),
        ({"num_generations": 16}, "adaptive_generations.max is 12 and num_generations 16"),
    ],
)
def test_what_goes_with_groups_of_one_size_only_is_refused(options, message, tiny_policy):
    with pytest.raises(InputError, match=message):
        module_of(tiny_policy(), **options)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"q": 0.0}, "adaptive_generations.q is 0.0"),
        ({"q": 1.0}, "adaptive_generations.q is 1.0"),
        ({"q": math.nan}, "adaptive_generations.q is nan"),
        ({"max": 1}, "adaptive_generations.max is 1: a group has at least 2 rollouts"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(InputError, match=message):
        AdaptiveGenerations(**numbers)


def test_a_run_in_which_nothing_keeps_the_rewards(tiny_policy, toy_data, make_trainer):
    with pytest.raises(InputError, match=r"adaptive_generations goes by the rewards met so far, .*: add MiniRec, or"):
        make_trainer(max_epochs=1).fit(module_of(tiny_policy()), toy_data(**SMALL))


def test_sharded_models_are_refused(tiny_policy, toy_data, make_trainer, monkeypatch):
    trainer, module = make_trainer(max_epochs=1, callbacks=[RewardHistory()]), module_of(tiny_policy())
    module.trainer = trainer
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy(accelerator=None))
    with pytest.raises(InputError, match=r"FSDPStrategy needs all ranks to run the model equally often, .*: use the"):
        module.setup("fit")


def test_a_fixed_ledger_is_cut_to_its_rollouts(tiny_policy, toy_data, make_trainer, tmp_path):
    chooser = make_trainer(max_epochs=1, callbacks=[SELECTIONS["own"]()])
    chooser.fit(module_of(tiny_policy(), adaptive_generations=None), toy_data(**SMALL))
    session_of(chooser).ledger.to_parquet(tmp_path / "ledger.parquet")
    watch = Watch()
    callbacks = [watch, RewardHistory(), SelectSamples(ledger=str(tmp_path / "ledger.parquet"), budget=10)]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module_of(tiny_policy()), toy_data(**SMALL))
    best = session_of(chooser).ledger.selected(None)
    assert sorted(watch.plans[0]) == sorted(best[:10])
    assert set(watch.plans[1]) <= set(best)
    assert sum(watch.drawn(1).values()) < 10 * GROUP + ADAPTIVE.max
