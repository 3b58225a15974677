"""What becomes of groups without reward variance: counted by hand, gradients by a loop over single completions."""

import copy

import numpy as np
import pytest
import torch
from helpers.plain_policy import PlainPolicy
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RewardHistory, SelectSamples
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:picked:UserWarning"),
]
SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples


def rare(completions, **columns):
    """A reward that leaves most groups of three without variance."""
    return [float(int(item.removeprefix("i")) % 9 == 0) for item in completions]


class Recorder:
    def __init__(self, reward=rare):
        self.reward, self.calls = reward, []

    def __call__(self, completions, sample_id):
        self.calls.append((list(completions), list(sample_id)))
        return self.reward(completions)

    def groups(self, size=3):
        """(sample_id, rewards) of every group, in the order they were drawn."""
        for completions, sample_id in self.calls:
            rewards = self.reward(completions)
            for start in range(0, len(rewards), size):
                yield sample_id[start], rewards[start : start + size]


class Watch(Callback):
    def __init__(self):
        self.gradients, self.trained, self.batches, self.losses, self.logged, self.signals = [], [], [], [], [], []
        self.rollouts = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(outputs["trained"].tolist())
        self.batches.append(batch["sample_id"].tolist())
        self.losses.append(float(outputs["loss"]))
        self.signals.append(outputs.get("signals"))
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.rollouts.append(copy.deepcopy(pl_module.generation.at(pl_module.generation.position)))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def fit(make_trainer, module, data, callbacks=(), **options):
    watch = Watch()
    trainer = make_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **options}, callbacks=[watch, *callbacks])
    trainer.fit(module, data)
    return watch


def variance(rewards):
    return len(set(rewards)) > 1


def histories(rollouts, b):
    return ([i for i in rollouts.batch[key][b].tolist() if i >= 0] for key in ("history", "seen"))


def test_groups_are_counted_and_logged(tiny_policy, toy_data, make_trainer):
    reward = Recorder()
    module = GRPORecModule(tiny_policy(), [reward], num_generations=3, optimizer=sgd)
    history = RewardHistory()
    trainer = make_trainer(callbacks=[history, watch := Watch()], max_epochs=3, log_every_n_steps=1)
    trainer.fit(module, toy_data(**SMALL))
    wasted, groups = {}, list(reward.groups())
    for sample_id, rewards in groups:
        wasted[sample_id] = wasted.get(sample_id, 0) + (not variance(rewards))
    assert {0, 1, 2, 3} >= set(wasted.values()) >= {1, 2, 3}
    assert session_of(trainer).store.wasted_groups(list(wasted)).tolist() == list(wasted.values())
    first = groups[:8]
    assert watch.logged[0]["frac_reward_zero_std"] == pytest.approx(np.mean([not variance(r) for _, r in first]))


@pytest.mark.parametrize("treatment", ["keep", "dynamic_sampling", "preference_pairs"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_training_goes_on_where_every_group_is_degenerate(policy, toy_data, make_trainer, treatment, beta):
    def found(completions, target, **columns):  # each rollout hits, so there is nothing to prefer either
        return [1.0] * len(completions)

    before = copy.deepcopy(policy.state_dict())
    data = toy_data(**SMALL)
    data.setup("fit")
    module = GRPORecModule(
        policy, [found], num_generations=2, optimizer=sgd, wasted_groups=treatment, temperature=1.0, beta=beta
    )
    watch = fit(make_trainer, module, data, limit_train_batches=2)
    assert all(np.isfinite(watch.losses))
    assert [logged["frac_reward_zero_std"] for logged in watch.logged] == [1.0, 1.0]
    moved = any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    if treatment == "preference_pairs":
        assert moved
        return
    assert not moved
    assert all(not gradient.any() for step in watch.gradients for gradient in step)
    assert watch.losses == pytest.approx([0.0, 0.0], abs=1e-7)


def test_momentum_goes_on_through_a_degenerate_batch(tiny_policy, toy_data, make_trainer):
    """A gradient of zero is not the same as no gradient: what the optimizer has in hand still moves."""
    calls = []

    def once(completions, **columns):
        calls.append(len(completions))
        return [float(i % 2) for i in range(len(completions))] if len(calls) == 1 else [0.0] * len(completions)

    policy = tiny_policy()
    weights = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append(pl_module.policy.model.get_input_embeddings().weight.detach().clone())

    module = GRPORecModule(
        policy, [once], num_generations=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)
    )
    fit(make_trainer, module, toy_data(**SMALL), [Weights()], limit_train_batches=3)
    first, second = weights[1] - weights[0], weights[2] - weights[1]
    assert first.any()
    torch.testing.assert_close(second, 0.5 * first, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("workers", [0, 2])
def test_dynamic_sampling_trains_on_the_first_groups_with_variance(toy_data, tiny_policy, make_trainer, workers):
    reward = Recorder()
    options = {"wasted_groups": "dynamic_sampling", "oversample": 3.0}
    module = GRPORecModule(tiny_policy(), [reward], num_generations=3, optimizer=sgd, **options)
    data = toy_data(**SMALL, batch_size=6, num_workers=workers)
    trainer_watch = fit(make_trainer, module, data, max_epochs=2)
    assert [len(ids) for ids in trainer_watch.batches] == [18, 18, 18, 18, 5] * 2
    for epoch in (trainer_watch.batches[:5], trainer_watch.batches[5:]):  # unused prompts come again in the next epoch
        assert sorted(i for ids in epoch for i in ids) == sorted(data.pool_ids.tolist())
    groups = iter(list(reward.groups()))
    drawn_in_all, ends = 0, set()
    for ids, trained, logged, signals in zip(
        trainer_watch.batches, trainer_watch.trained, trainer_watch.logged, trainer_watch.signals, strict=True
    ):
        wanted = -(-len(ids) // 3)
        met, kept = [], []
        for start in range(0, len(ids), wanted):
            for sample_id in ids[start : start + wanted]:
                drawn, rewards = next(groups)
                assert drawn == sample_id
                met.append((sample_id, rewards))
                if variance(rewards):
                    kept.append(sample_id)
            if len(kept) >= wanted:
                break
        ends.add((len(kept) >= wanted, len(met) < len(ids)))
        assert trained == kept[:wanted]
        assert signals.sample_id.tolist() == [sample_id for sample_id, _ in met]
        np.testing.assert_allclose(signals.rewards.numpy(), [rewards for _, rewards in met])
        assert (logged["dynamic_sampling/drawn"], logged["dynamic_sampling/trained"]) == (len(met), len(trained))
        drawn_in_all += len(met)
    assert next(groups, None) is None
    assert {full for full, _ in ends} == {True, False}
    assert module.cost.rollouts["training"] == 3 * drawn_in_all


def test_dynamic_sampling_averages_over_what_is_trained_on(policy, toy_data, make_trainer):
    plain = PlainPolicy(policy)
    module = GRPORecModule(policy, [rare], num_generations=3, optimizer=sgd, wasted_groups="dynamic_sampling")
    watch = fit(make_trainer, module, toy_data(**SMALL, batch_size=10), limit_train_batches=1)
    rollouts = watch.rollouts[0]
    assert 2 <= len(rollouts) <= 10
    tokens = sum(len(plain.ids[item]) for item in rollouts.items.flatten().tolist())
    for b in range(len(rollouts)):
        history, seen = histories(rollouts, b)
        rewards = np.array(rollouts.rewards[b].tolist())
        assert rewards.std() > 0
        for g, item in enumerate(rollouts.items[b].tolist()):
            advantage = (rewards[g] - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            (-advantage * plain.item_logp(history, seen, item) / tokens).backward()
    for ours, truth in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)


def test_samples_and_distinct_samples_of_a_run_are_those_trained_on(command, tmp_path):
    import json

    from minirec_pl.cli.main import main

    options = ["--model.wasted_groups=dynamic_sampling", "--model.oversample=2", "--model.num_iterations=2"]
    arguments = [word for word in command.grpo(tmp_path / "runs", *options) if not word.startswith("--selection")]
    assert main([*arguments, "--selection=null"]) == 0
    results = json.loads((tmp_path / "runs" / "latest" / "results.json").read_text())
    assert 0 < results["distinct_samples"] <= 2 * results["samples_per_epoch"]
    assert results["samples_per_epoch"] < results["rollouts"]["training"] / (2 * 4)


def test_preference_pairs_have_the_gradient_of_a_plain_loop(policy, toy_data, make_trainer):
    plain = PlainPolicy(policy)
    module = GRPORecModule(policy, [rare], num_generations=3, optimizer=sgd, wasted_groups="preference_pairs")
    watch = fit(make_trainer, module, toy_data(**SMALL, batch_size=12), limit_train_batches=1)
    rollouts = watch.rollouts[0]
    tokens = sum(len(plain.ids[item]) for item in rollouts.items.flatten().tolist())
    kinds = {"pairs": 0, "mixed": 0}
    for b in range(12):
        history, seen = histories(rollouts, b)
        items, target = rollouts.items[b].tolist(), int(rollouts.batch["target"][b])
        rewards = np.array(rollouts.rewards[b].tolist())

        def mean_logp(item, history=history, seen=seen):
            return plain.item_logp(history, seen, item) / len(plain.ids[item])

        if rewards.std() > 0:
            kinds["mixed"] += 1
            for g, item in enumerate(items):
                advantage = (rewards[g] - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
                (-advantage * plain.item_logp(history, seen, item) / tokens).backward()
        elif target not in items:
            kinds["pairs"] += 1
            for item in set(items):
                margin = mean_logp(target) - mean_logp(item)
                (torch.log1p(torch.exp(-margin)) / len(set(items)) / 12).backward()
    assert min(kinds.values()) > 0
    for ours, truth in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)
    assert module.cost.tokens_backward["training"] > 0


@pytest.mark.parametrize("iterations", [1, slow(3)])
def test_an_all_zero_group_still_teaches(tiny_policy, toy_data, make_trainer, iterations):
    def nothing(completions, **columns):
        return [0.0] * len(completions)

    data = toy_data(**SMALL)
    data.setup("fit")
    batch = next(iter(data.sample_loader(data.pool_ids, batch_size=77)))

    def solved(policy):
        return float(policy.item_logps(batch).gather(1, batch["target"][:, None]).mean())

    gained = {}
    for treatment in ("keep", "preference_pairs"):
        policy = tiny_policy()
        before = solved(policy)
        options = {"wasted_groups": treatment, "num_iterations": iterations, "num_generations": 4}
        module = GRPORecModule(policy, [nothing], optimizer=lambda p: torch.optim.Adam(p, lr=0.005), **options)
        fit(make_trainer, module, toy_data(**SMALL), max_epochs=3)
        gained[treatment] = solved(policy) - before
    assert gained["keep"] == 0
    assert gained["preference_pairs"] > 0.2


def test_distinct_rollouts_differ_and_their_rewards_stand_for_no_probability(policy, toy_data, make_trainer):
    exact = copy.deepcopy(policy)
    module = GRPORecModule(policy, num_generations=12, distinct_rollouts=True, optimizer=sgd)
    watch = fit(make_trainer, module, toy_data(**SMALL), limit_train_batches=1)
    for row in watch.rollouts[0].items.tolist():
        assert len(set(row)) == 12
    signals, batch = watch.signals[0], watch.rollouts[0].batch
    assert signals.rewards is None
    p = exact.item_logps(batch).gather(1, batch["target"][:, None])[:, 0].exp()
    torch.testing.assert_close(signals.solve_probability.float(), p, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("callback", [MiniRec, SelectSamples])
def test_distinct_rollouts_are_refused_with_the_published_mode(tiny_policy, toy_data, make_trainer, callback):
    module = GRPORecModule(tiny_policy(), num_generations=4, distinct_rollouts=True)
    trainer = make_trainer(callbacks=[callback(8, selector=MiniRecSelector(mode="official"))], max_epochs=1)
    with pytest.raises(InputError, match="distinct_rollouts changes what a mean reward means"):
        trainer.fit(module, toy_data(**SMALL))


def test_distinct_rollouts_with_a_selector_that_goes_by_exact_probabilities(tiny_policy, toy_data, make_trainer):
    selector = MiniRecSelector(difficulty="pass_at_group", gate=(-1.0, 2.0))
    module = GRPORecModule(tiny_policy(), num_generations=4, distinct_rollouts=True, scoring_generations=0)
    minirec = MiniRec(8, selector=selector, curriculum=EasyToHardCurriculum(n_folds=2))
    watch = fit(make_trainer, module, toy_data(**SMALL), [minirec], max_epochs=2)
    assert [len(ids) for ids in watch.trained] == [8, 8]


def test_too_few_items_left_for_a_distinct_group(tiny_policy, toy_data, make_trainer):
    module = GRPORecModule(tiny_policy(), num_generations=79, distinct_rollouts=True)
    with pytest.raises(InputError, match=r"num_generations is 79 but sample_id \d+ has only \d+ items left to draw"):
        fit(make_trainer, module, toy_data(**SMALL))


def test_completions_no_reward_applies_to_teach_nothing(policy, toy_data, make_trainer):
    """They are in no baseline, and a group without any is not among the signals."""

    def some(completions, sample_id):
        rewards = [(int(item.removeprefix("i")) % 3) / 2 for item in completions]
        return [
            None if g % 4 == 0 or i % 5 == 0 else r for g, (r, i) in enumerate(zip(rewards, sample_id, strict=True))
        ]

    plain = PlainPolicy(policy)
    module = GRPORecModule(policy, [some], num_generations=4, optimizer=sgd)
    data = toy_data(**SMALL, batch_size=16)
    with pytest.warns(UserWarning, match="no reward of some applies"):
        watch = fit(make_trainer, module, data, limit_train_batches=1)
    rollouts, signals = watch.rollouts[0], watch.signals[0]
    ids = rollouts.batch["sample_id"].tolist()
    assert signals.sample_id.tolist() == [i for i in ids if i % 5]
    tokens = sum(len(plain.ids[item]) for item in rollouts.items.flatten().tolist())
    for b, sample_id in enumerate(ids):
        history, seen = histories(rollouts, b)
        items = rollouts.items[b].tolist()
        rewards = np.array([(int(policy.catalogue.item_ids[i].removeprefix("i")) % 3) / 2 for i in items[1:]])
        if sample_id % 5 == 0 or rewards.std() == 0:
            continue
        row = signals.sample_id.tolist().index(sample_id)
        assert float(signals.rewards[row].mean()) == pytest.approx(rewards.mean())
        for reward, item in zip(rewards, items[1:], strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            (-advantage * plain.item_logp(history, seen, item) / tokens).backward()
    for ours, truth in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)


def test_a_batch_that_no_reward_applies_to(tiny_policy, toy_data, make_trainer):
    def silent(completions):
        return [None] * len(completions)

    before = copy.deepcopy((policy := tiny_policy()).state_dict())
    module = GRPORecModule(policy, [silent], num_generations=4, optimizer=sgd)
    with pytest.warns(UserWarning, match="no reward of silent applies"):
        watch = fit(make_trainer, module, toy_data(**SMALL), [RewardHistory()], limit_train_batches=2)
    assert watch.signals == [None, None]
    assert watch.losses == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wasted_groups": "drop"}, "wasted_groups is 'drop': choose one of keep, dynamic_sampling, preference_pairs"),
        ({"oversample": 0.5}, "oversample is 0.5: .* at least 1"),
        ({"distinct_rollouts": True, "top_k": 5}, "distinct_rollouts draws from the whole distribution"),
        ({"distinct_rollouts": True, "top_p": 0.9}, "distinct_rollouts draws from the whole distribution"),
    ],
)
def test_options_out_of_range(tiny_policy, options, message):
    with pytest.raises(InputError, match=message):
        GRPORecModule(tiny_policy(), **options)
