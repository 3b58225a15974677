"""GRPO without rollouts through a real Trainer, against plain loops, the sampled path and finite differences."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers.plain_policy import PlainPolicy, batch_of, many_token_policy, padded, shaken, unequal_ids
from helpers.watch import Watch, fit
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import MiniRec
from minirec_pl.data.samples import Catalogue
from minirec_pl.grpo.expected import expected_loss
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.folder import StoredPolicy, write_policy
from minirec_pl.policy.language_models.tiny import build_tiny
from minirec_pl.rewards import NDCGReward, hit, hit_or_miss, rank_penalty
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.expected_update import group_moments


@hit_or_miss(hit=2.0, miss=0.5)
def half(completions, target):
    return [2.0 if item == wanted else 0.5 for item, wanted in zip(completions, target, strict=True)]


@hit_or_miss()
def wrong(completions, target):
    return [float(item != wanted) for item, wanted in zip(completions, target, strict=True)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def expected_module(policy, **options):
    lengths = {} if policy.equal_lengths else {"loss_type": "dr_grpo"}
    return GRPORecModule(policy, **{"rollouts": "expected", "optimizer": sgd, **lengths, **options})


@pytest.mark.parametrize("scale", ["group", "none", "mean"])
@pytest.mark.parametrize("rewards", [None, [half, NDCGReward(5)]], ids=["hit", "half"])
def test_the_gradient_is_that_of_a_plain_loop(policy, toy_data, make_trainer, scale, rewards):
    plain, group = PlainPolicy(policy), 5
    weights = None if rewards is None else [0.5, 3.0]
    module = expected_module(
        policy, rewards=rewards, reward_weights=weights, num_generations=group, scale_rewards=scale, temperature=1.3
    )
    high, low = (1.0, 0.0) if rewards is None else (4.0, 0.25)
    watch = fit(make_trainer, module, toy_data(batch_size=6), 1)
    batch, logged = watch.batches[0], watch.logged[0]
    chances = []
    for b in range(6):
        history = [i for i in batch["history"][b].tolist() if i >= 0]
        seen = [i for i in batch["seen"][b].tolist() if i >= 0]
        logp = plain.item_logp(history, seen, int(batch["target"][b]), 1.3)
        p = float(logp.detach().exp())
        chances.append(p)
        slope = 0.0  # of E[A grad log pi] over the number of hits, from its definition
        for k in range(group + 1):
            rewards_k = torch.tensor([high] * k + [low] * (group - k), dtype=torch.float64)
            centred = rewards_k - rewards_k.mean()
            if 0 < k < group:
                divisor = {"group": rewards_k.std() + 1e-4, "none": 1.0, "mean": rewards_k.mean()}[scale]
                ways = math.comb(group, k) * p**k * (1 - p) ** (group - k)
                advantage = centred / divisor
                slope += float(ways * (advantage[:k].sum() / p - advantage[k:].sum() / (1 - p)) / group)
        (-slope * logp.exp() / (6 * policy.id_length)).backward()
    for ours, theirs in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.grad, rtol=2e-4, atol=2e-6)
    p = torch.tensor(chances, dtype=torch.float64)
    assert logged["reward"] == pytest.approx(float((low + (high - low) * p).mean()), rel=1e-4)
    assert logged["frac_reward_zero_std"] == pytest.approx(float((p**group + (1 - p) ** group).mean()), rel=1e-4)
    assert logged["expected/underflow"] == 0
    torch.testing.assert_close(watch.outputs[0]["signals"].solve_probability.double(), p, rtol=1e-4, atol=0)
    assert watch.outputs[0]["signals"].rewards is None
    assert not any(module.cost.rollouts.values())


def test_supervised_is_the_likelihood_of_the_targets(policy, toy_data, make_trainer):
    twin = copy.deepcopy(policy)
    watch = fit(make_trainer, GRPORecModule(policy, rollouts="supervised", optimizer=sgd), toy_data(batch_size=6), 1)
    batch = watch.batches[0]
    logps, _, _ = twin.completion_logps(batch, batch["target"][:, None])
    (-logps.sum() / (6 * twin.id_length)).backward()
    for ours, theirs in zip(watch.gradients[0], twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("correction", [True, False])
def test_the_exact_kl_holds_the_policy_back(tiny_policy, toy_data, make_trainer, correction):
    policy = tiny_policy()
    start = copy.deepcopy(policy)
    module = expected_module(
        policy,
        beta=0.7,
        use_bias_correction_kl=correction,
        num_generations=4,
        optimizer=lambda p: torch.optim.SGD(p, 5.0),
    )
    before = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.append(copy.deepcopy(pl_module.policy))

    watch = Watch()
    trainer = make_trainer(max_epochs=-1, max_steps=3, log_every_n_steps=1, callbacks=[watch, Keep()])
    trainer.fit(module, toy_data(batch_size=6))
    policy, batch = before[2], watch.batches[2]
    every = policy.root_logps(policy.run_prompt(batch).states, batch["seen"])
    with torch.no_grad():
        old = start.root_logps(start.run_prompt(batch).states, batch["seen"])
    possible = every.detach() > -1e30
    zero = torch.zeros(())
    first, second = (every, old) if correction else (old, every)
    kl = torch.where(possible, first.exp() * (first - second), zero).sum(dim=1).mean()
    logp = every.gather(1, policy.trie.child_of[batch["target"]])[:, 0]
    pull = expected_loss(logp, group_moments(logp, 4).weight).losses.mean()
    (pull + 0.7 * kl).backward()
    for ours, theirs in zip(watch.gradients[2], policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)
    forward = torch.where(possible, every.exp() * (every - old), zero).sum(dim=1).mean()
    assert watch.logged[2]["kl"] == pytest.approx(float(forward), rel=1e-3)
    assert watch.logged[2]["kl"] > 0


def test_accumulation_gives_the_gradient_of_the_whole_batch(policy, toy_data, make_trainer):
    twin = copy.deepcopy(policy)
    whole = fit(make_trainer, expected_module(policy), toy_data(batch_size=6), 2)
    parts = fit(make_trainer, expected_module(twin), toy_data(batch_size=2), 2, accumulate_grad_batches=3)
    assert len(parts.batches) == 6
    for ours, theirs in zip(parts.gradients, whole.gradients, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_train_as_one_process(tiny_policy, toy_data, make_trainer, tmp_path):
    """A whole epoch, with a ragged end: one sample is repeated on the second rank and has no weight."""

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.policy.state_dict(), tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    def run(batch_size, **options):
        data = toy_data(batch_size=batch_size)
        data.setup("fit")
        make_trainer(max_epochs=1, callbacks=[Keep()], **options).fit(expected_module(tiny_policy()), data)
        return len(data.train_sampler.sample_ids)

    assert run(6) % 2 == 1
    run(3, devices=2, strategy="ddp_fork")
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for weights in two:
        for name, value in weights.items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_sampled_gradient_comes_to_the_expected_one_on_average(tmp_path):
    """4,000 groups of 16 at a p of 0.3, by the sampler itself, in 30 random directions."""
    policy = many_token_policy(tmp_path, 12)
    one = batch_of([[1, 2]], [[1]], [0])
    one["target"] = policy.generate(one, 1, temperature=1e-3).items[:, 0]
    low, high = 0.01, 10.0  # the higher, the flatter
    for _ in range(60):
        temperature = (low + high) / 2
        chance = float(policy.target_pass(one, temperature).logp.detach().exp())
        low, high = (temperature, high) if chance > 0.3 else (low, temperature)
    assert chance == pytest.approx(0.3, abs=1e-4)
    group, rounds = 16, 40
    batch = {name: value.expand(100, *value.shape[1:]) for name, value in one.items()}
    module = GRPORecModule(policy, num_generations=group, loss_type="dr_grpo", temperature=temperature)
    module.configure_model()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    directions = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(30)]

    def along(gradients):
        return torch.tensor(
            [sum(float((g * d).sum()) for g, d in zip(gradients, one, strict=True)) for one in directions]
        )

    passed = policy.target_pass(one, temperature)
    weight = group_moments(passed.logp, group).weight
    ours = along(torch.autograd.grad(expected_loss(passed.logp, weight).losses.sum() / passed.length, parameters))
    found = []
    for _ in range(rounds):
        rollouts = module.sampler.roll_out(batch, generator, keep_logps=False)
        module.objective.set_advantages([rollouts])
        shares = torch.tensor([float(rollouts.mask.sum()), 100.0 * group, 100.0])
        update = module.objective.update(policy, rollouts, shares, temperature)
        found.append(along(torch.autograd.grad(update.loss, parameters)))
    theirs = torch.stack(found)
    error = theirs.std(dim=0) / math.sqrt(rounds)
    away = ((theirs.mean(dim=0) - ours) / error).abs()
    print(f"p = {chance:.3f}; standard errors away in 30 directions: {[round(float(v), 1) for v in sorted(away)]}")
    assert float(away.max()) < 4
    assert float((ours / error).abs().median()) > 4  # the errors are small enough to tell


@pytest.mark.parametrize("length", ["one", "many"])
def test_without_scaling_it_is_the_gradient_of_the_chance_of_a_hit(tmp_path, length):
    catalogue = Catalogue([f"i{i}" for i in range(12)])
    ids = unequal_ids(12) if length == "many" else [[item + 3] for item in range(12)]
    model = shaken(
        build_tiny({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}, 15)
    )  # LayerNorm is exact
    write_policy(tmp_path / "policy", StoredPolicy(model, catalogue, padded(ids), {}))
    policy = GenerativePolicy(pretrained=str(tmp_path / "policy")).double().eval()
    batch = batch_of([[1, 2], [3]], [[1, 2], [3]], [5, 7])
    parameters = [p for p in policy.parameters() if p.requires_grad]
    passed = policy.target_pass(batch, 1.0)
    weight = group_moments(passed.logp, 4, scale_rewards="none", baseline="leave_one_out").weight
    gradients = torch.autograd.grad(expected_loss(passed.logp, weight).losses.sum(), parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for parameter, part in zip(parameters, direction, strict=True):
                    parameter.add_(step * part)
                values.append(float(policy.target_pass(batch, 1.0).logp.exp().sum()))
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.add_(1e-5 * part)
        slope = (values[0] - values[1]) / 2e-5
        ours = -sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert ours == pytest.approx(slope, rel=1e-5)


def test_with_a_selection_it_needs_no_rollouts_at_all(tiny_policy, toy_data, make_trainer):
    module = expected_module(tiny_policy(), scoring_generations=0)
    selector = MiniRecSelector(difficulty="pass_at_group", gate=(0.0, 1.0))
    callback = MiniRec(0.25, selector=selector, rescore_fraction=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(callbacks=[callback], max_epochs=3)
        trainer.fit(module, toy_data())
    assert not any(module.cost.rollouts.values())
    spent = module.cost.tokens_forward["training"]
    assert spent == module.cost.tokens_backward["training"] > 0


def test_it_learns(tiny_policy, toy_data, make_trainer):
    policy, data = tiny_policy(), toy_data(batch_size=32)
    rates = []
    module = expected_module(policy, scale_rewards="mean", optimizer=lambda p: torch.optim.AdamW(p, 3e-3))

    class Rates(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rates.append(float(trainer.callback_metrics["train/reward"]))

    make_trainer(callbacks=[Rates()], max_epochs=15).fit(module, data)
    assert rates[-1] > 3 * rates[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_generations": 1}, "num_generations is 1: "),
        (
            {"num_iterations": 2},
            "num_iterations is 2 and rollouts='expected' draws none.*: set num_iterations to 1, or",
        ),
        (
            {"steps_per_generation": 4},
            "steps_per_generation is 4 .*: set steps_per_generation to null, or rollouts to sa",
        ),
        ({"wasted_groups": "dynamic_sampling"}, "wasted_groups is dynamic_sampling .*: set wasted_groups to keep, or"),
        ({"wasted_groups": "preference_pairs"}, "wasted_groups is preference_pairs .*: set wasted_groups to keep, or"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' .*: use group, none or mean, or rollouts='sample'"),
        ({"top_k": 5}, "rollouts='expected' draws nothing: set distinct_rollouts to false, top_k and top_p to null"),
        ({"top_p": 0.9}, "rollouts='expected' draws nothing"),
        ({"distinct_rollouts": True}, "rollouts='expected' draws nothing"),
        (
            {"rewards": [rank_penalty]},
            "reward rank_penalty is not declared a function of hit or miss, .*: set rollouts to",
        ),
        ({"scale_rewards": "mean", "rewards": [hit], "reward_weights": [-1.0]}, "divides by the mean reward"),
    ],
)
def test_what_has_no_expectation_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        GRPORecModule(GenerativePolicy(config={}), rollouts="expected", **options)


@pytest.mark.parametrize("kind", ["expected", "supervised"])
def test_a_policy_without_exact_probabilities_is_refused(kind):
    from minirec_pl.policy import LanguageModel, RetrievalPolicy

    options = {"language_model": LanguageModel("anywhere"), "max_completion_length": 8}
    policy = RetrievalPolicy.unloaded(options)
    with pytest.raises(
        InputError, match=f"rollouts='{kind}' needs the exact probability of the target, and a Retrieva"
    ):
        GRPORecModule(policy, rollouts=kind)


def test_ids_of_unequal_length_take_dr_grpo_alone(tmp_path, toy_data, make_trainer):
    data = toy_data()
    data.setup("fit")
    policy = many_token_policy(tmp_path / "policy", data.catalogue)
    for loss_type in ("grpo", "bnpo", "dapo"):
        module = GRPORecModule(policy, rollouts="expected", loss_type=loss_type)
        with pytest.raises(
            InputError, match=f"unequal lengths, for which loss_type='{loss_type}' .*: set loss_type to dr_"
        ):
            make_trainer().fit(module, data)
    module = GRPORecModule(policy, rollouts="expected", loss_type="dr_grpo", beta=0.1)
    with pytest.raises(
        InputError, match=r"beta is 0.1 and .* ids of one token only: set beta to 0, or rollouts to sample"
    ):
        make_trainer().fit(module, data)


def test_a_reward_that_gives_something_else_is_named(tiny_policy, toy_data, make_trainer):
    module = expected_module(tiny_policy(), rewards=[wrong])
    with pytest.raises(
        InputError, match=r"reward wrong declares 1 for a hit and gave 0 for sample_id \d+: declare what"
    ):
        make_trainer().fit(module, toy_data())


def test_a_target_that_the_user_has_seen_is_named(tiny_policy):
    policy = tiny_policy()
    batch = batch_of([[1, 2], [3]], [[1, 2], [3]], [5, 3])
    module = expected_module(policy)
    module.configure_model()
    with pytest.raises(
        InputError, match="the target of sample_id 101 cannot be recommended, since the user has seen it"
    ):
        module.expectation.update(policy, None, batch, torch.tensor(2.0), 1.0)


@pytest.mark.parametrize("rollouts", ["expected", "supervised"])
@pytest.mark.parametrize("beyond", [-1, 0, 9_999])
def test_a_target_outside_the_catalogue_is_named(tmp_path, tiny_policy, rollouts, beyond):
    for policy in (tiny_policy(), many_token_policy(tmp_path / "several")):
        outside = beyond if beyond < 0 else policy.trie.n_items + beyond
        batch = batch_of([[1, 2], [3]], [[1, 2], [3]], [5, outside])
        module = expected_module(policy, rollouts=rollouts)
        module.configure_model()
        with pytest.raises(InputError, match=rf"the target of sample_id 101 is item {outside}, and the catalogue has"):
            module.expectation.update(policy, None, batch, torch.tensor(2.0), 1.0)


def test_a_reward_that_counts_for_nothing_teaches_nothing(policy, toy_data, make_trainer):
    module = expected_module(policy, rewards=[hit], reward_weights=[0.0], scale_rewards="mean")
    watch = fit(make_trainer, module, toy_data(batch_size=6), 1)
    assert not any(gradient.any() for gradient in watch.gradients[0])


@pytest.mark.parametrize("rollouts", ["expected", "sample"])
def test_hard_picks_are_warned_of_only_where_rollouts_are_drawn(tiny_policy, toy_data, make_trainer, rollouts):
    module = GRPORecModule(tiny_policy(), rollouts=rollouts, optimizer=sgd, scoring_generations=0)
    selector = MiniRecSelector(difficulty="pass_at_group", mode="official", gradient="first", num_generations=1)
    trainer = make_trainer(callbacks=[MiniRec(0.25, selector=selector)], max_epochs=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, toy_data())
    told = any("most of their rollouts will teach nothing" in str(warning.message) for warning in said)
    assert told == (rollouts == "sample")
