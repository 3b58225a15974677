"""Groups of unequal size in one batch: gradients by a loop over single completions, in float64."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.plain_policy import PlainPolicy, many_token_policy, one_token_policy
from helpers.text_policy import text_policy, toy_batch, toy_catalogue, write_model

from minirec_pl.grpo.buffer import RolloutBatch, figures_of, signals_of, step_totals
from minirec_pl.grpo.objective import Objective
from minirec_pl.grpo.sampler import RolloutSampler
from minirec_pl.policy.interface import RolloutOptions
from minirec_pl.rewards.calls import Rewarder
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.utils.cost import Cost

ITEMS, LARGEST = 12, 7
SIZES = {"unequal": [3, 2, 7, 2], "equal": [4, 4, 4], "ragged": [2, 7], "one group": [5], "largest": [7, 7]}
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
GPT_NEOX = {"model_type": "gpt_neox"}  # rounds no state to float32, as the norms of Llama do


def exact(make, *arguments):
    """A policy that computes in float64 throughout."""
    made = make(*arguments, **GPT_NEOX)
    made.model.double()
    return made


@pytest.fixture(params=["one token", "many tokens"])
def policy(request, tmp_path):
    made = (
        exact(one_token_policy, ITEMS)
        if request.param == "one token"
        else exact(many_token_policy, tmp_path / "p", ITEMS)
    )
    return made


def prompts(n, seed):
    """n prompts over the items; what a user has had is not drawn again."""
    random = torch.Generator().manual_seed(seed)
    history = torch.randint(ITEMS, (n, 3), generator=random)
    history[0, 0] = -1
    target = torch.randint(ITEMS, (n,), generator=random)
    seen = torch.full((n, 1), -1)
    return {"history": history, "seen": seen, "target": target, "sample_id": torch.arange(n) + 10 * seed}


def unequal(policy, sizes, seed=0, pairs=False):
    """Rollouts of groups of these sizes, float64, with rewards of which some are equal and some do not apply."""
    random = torch.Generator().manual_seed(seed)
    batch = {**prompts(len(sizes), seed), "group_size": torch.tensor(sizes)}
    exists = torch.arange(LARGEST) < batch["group_size"][:, None]
    items = torch.randint(ITEMS, exists.shape, generator=random).where(exists, 0)
    rewards = torch.randint(4, exists.shape, generator=random).double() / 3
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    applies = exists & (torch.rand(exists.shape, generator=random) > 0.1)
    applies[:, :2] = True
    if len(sizes) > 2:
        rewards[2] = 0.25  # a flat group
    mask = (policy.trie.item_tokens[items] >= 0) & exists[..., None]
    noise = torch.randn(mask.shape, generator=random, dtype=torch.float64)
    rewards = rewards.masked_fill(~applies, 0.0)
    flat = torch.tensor([len(set(row[known].tolist())) < 2 for row, known in zip(rewards, applies, strict=True)])
    return RolloutBatch(
        batch=batch,
        items=items,
        rewards=rewards,
        applies=applies,
        rewards_by_name={"some": rewards.masked_fill(~applies, math.nan)},
        mask=mask,
        entropy=torch.zeros(mask.shape, dtype=torch.float64),
        target_logps=None,
        target_mask=None,
        old_logps=noise,
        ref_logps=0.5 * noise,
        advantages=torch.zeros_like(rewards),
        learns=torch.ones_like(flat),
        pairs=flat & pairs,
    )


def plain_advantages(rewards, scale, baseline):
    """Of the rewards of one group, by the papers."""
    n, mean = len(rewards), sum(rewards) / max(len(rewards), 1)
    if n < 2 or max(rewards) == min(rewards):
        return [0.0] * n
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1)) + 1e-4
    divisor = {"group": deviation, "none": 1.0, "mean": mean}[scale]
    more = n / (n - 1) if baseline == "leave_one_out" else 1.0
    return [more * (r - mean) / divisor for r in rewards]


def plain_groups(plain, rollouts, objective, off_policy):
    """For each group, the losses of its tokens: [completion][token]."""
    for b, size in enumerate(rollouts.batch["group_size"].tolist()):
        history = [i for i in rollouts.batch["history"][b].tolist() if i >= 0]
        known = rollouts.applies[b, :size].tolist()
        given = [r for r, k in zip(rollouts.rewards[b, :size].tolist(), known, strict=True) if k]
        advantages = iter(plain_advantages(given, objective.scale_rewards, objective.baseline))
        losses = []
        for g in range(size):
            advantage = next(advantages) if known[g] else 0.0
            row = []
            for t, (logp, _) in enumerate(plain.steps(history, [], int(rollouts.items[b, g]))):
                if off_policy:
                    ratio = (logp - rollouts.old_logps[b, g, t]).exp()
                    clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon)
                    gap = rollouts.ref_logps[b, g, t] - logp
                    kl = (gap.exp() - gap - 1) * ratio
                    row.append(-torch.minimum(ratio * advantage, clipped * advantage) + objective.beta * kl)
                else:
                    row.append(-advantage * logp)
            losses.append(row)
        yield losses


def plain_loss(groups, loss_type, length):
    """Each group alone, then their mean; DAPO and BNPO average over tokens, those of a group by 1 / its size."""
    if loss_type in ("dapo", "bnpo"):
        total = sum(sum(sum(row) for row in rows) / len(rows) for rows in groups)
        return total / sum(sum(len(row) for row in rows) / len(rows) for rows in groups)
    alone = []
    for rows in groups:
        share = [len(row) if loss_type == "grpo" else length for row in rows]
        alone.append(sum(sum(row) / n for row, n in zip(rows, share, strict=True)) / len(rows))
    return sum(alone) / len(alone)


def gradients(policy, loss):
    return torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True)


def assert_same(ours, truth):
    largest = 0.0
    for mine, wanted in zip(ours, truth, strict=True):
        if wanted is None:
            assert mine is None or not mine.any()
            continue
        torch.testing.assert_close(mine, wanted, **EXACT)
        largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-4


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("scale", "baseline"), [("group", "mean"), ("none", "leave_one_out"), ("mean", "mean"), ("none", "mean")]
)
def test_the_gradient_is_that_of_each_group_alone(policy, sizes, scale, baseline):
    rollouts = unequal(policy, SIZES[sizes], seed=1)
    rollouts.old_logps = rollouts.ref_logps = None
    for loss_type in LOSS_TYPES:
        objective = Objective(loss_type=loss_type, scale_rewards=scale, baseline=baseline)
        objective.set_advantages([rollouts])
        update = objective.update(policy, rollouts, step_totals([rollouts], 1, 1)[0], 1.0)
        plain = PlainPolicy(policy)
        truth = plain_loss(list(plain_groups(plain, rollouts, objective, False)), loss_type, policy.id_length)
        assert_same(gradients(policy, update.loss), gradients(plain, truth))


def test_token_averages_are_those_of_groups_alone_where_ids_are_equally_long():
    policy = exact(one_token_policy, ITEMS)
    rollouts = unequal(policy, SIZES["unequal"], seed=2)
    rollouts.old_logps = rollouts.ref_logps = None
    for loss_type in ("dapo", "bnpo"):
        objective = Objective(loss_type=loss_type)
        objective.set_advantages([rollouts])
        update = objective.update(policy, rollouts, step_totals([rollouts], 1, 1)[0], 1.0)
        plain = PlainPolicy(policy)
        truth = plain_loss(list(plain_groups(plain, rollouts, objective, False)), "grpo", 1)
        assert_same(gradients(policy, update.loss), gradients(plain, truth))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy_and_with_a_reference(policy, loss_type):
    objective = Objective(loss_type=loss_type, beta=0.1, epsilon=0.3)
    rollouts = unequal(policy, SIZES["unequal"], seed=3)
    objective.set_advantages([rollouts])
    update = objective.update(policy, rollouts, step_totals([rollouts], 1, 1)[0], 1.0)
    plain = PlainPolicy(policy)
    truth = plain_loss(list(plain_groups(plain, rollouts, objective, True)), loss_type, policy.id_length)
    assert float(update.loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-10)
    assert_same(gradients(policy, update.loss), gradients(plain, truth))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_add_up_to_the_whole(policy, loss_type):
    objective = Objective(loss_type=loss_type)
    parts = [unequal(policy, sizes, seed) for seed, sizes in enumerate(([2, 7, 3], [4], [6, 2]))]
    for part in parts:
        part.old_logps = part.ref_logps = None
    objective.set_advantages(parts)
    shares = step_totals(parts, 3, 3)[0]
    loss = sum(objective.update(policy, part, shares, 1.0).loss for part in parts)
    plain = PlainPolicy(policy)
    groups = [group for part in parts for group in plain_groups(plain, part, objective, False)]
    assert_same(gradients(policy, loss), gradients(plain, plain_loss(groups, loss_type, policy.id_length)))


def test_groups_of_one_size_train_as_they_do_without_a_column_of_sizes(policy):
    for loss_type in LOSS_TYPES:
        objective = Objective(loss_type=loss_type)
        rollouts = unequal(policy, [4, 4, 4], seed=4)
        rollouts.old_logps = rollouts.ref_logps = None
        usual = rollouts.resized(4)
        usual.batch = {name: value for name, value in usual.batch.items() if name != "group_size"}
        found = []
        for each in (rollouts, usual):
            objective.set_advantages([each])
            found.append(gradients(policy, objective.update(policy, each, step_totals([each], 1, 1)[0], 1.0).loss))
        assert_same(*found)


def test_preference_pairs_weigh_one_a_group():
    policy = exact(one_token_policy, ITEMS)
    objective, rollouts = Objective(), unequal(policy, SIZES["unequal"], seed=5, pairs=True)
    rollouts.old_logps = rollouts.ref_logps = None
    rollouts.target_logps = torch.zeros(len(rollouts), 1, dtype=torch.float64)
    rollouts.target_mask = torch.ones(len(rollouts), 1, dtype=torch.bool)
    assert rollouts.pairs.any()
    objective.set_advantages([rollouts])
    ours = gradients(policy, objective.update(policy, rollouts, step_totals([rollouts], 1, 1)[0], 1.0).loss)
    plain = PlainPolicy(policy)
    loss = plain_loss(list(plain_groups(plain, rollouts, objective, False)), "dapo", 1)
    for b in rollouts.pairs.nonzero().flatten().tolist():
        history = [i for i in rollouts.batch["history"][b].tolist() if i >= 0]
        items = set(rollouts.items[b, : SIZES["unequal"][b]].tolist())
        for item in items:
            margin = plain.item_logp(history, [], int(rollouts.batch["target"][b])) - plain.item_logp(history, [], item)
            loss = loss + torch.log1p((-margin).exp()) / len(items) / len(rollouts)
    truth = gradients(plain, loss)
    for mine, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)  # the pairs' weights are float32


def sampler(policy, reward, **options):
    ids = np.array(policy.catalogue.item_ids, dtype=object)
    made = RolloutOptions(**{"num_generations": 4, **options})
    return RolloutSampler(
        policy, made, Rewarder([reward], None, ids), Objective(), Cost(), Trajectory(), largest=LARGEST
    )


def parity(completions, sample_id):
    return [None if i == 2 else float(int(c[1:]) % 2) for c, i in zip(completions, sample_id, strict=True)]


@pytest.mark.filterwarnings("ignore:no reward of parity applies")
@pytest.mark.parametrize("sizes", [*SIZES.values(), [7, 2, 2, 3]])
@pytest.mark.parametrize("at_once", [True, False])
def test_nothing_is_drawn_for_padding_and_rows_keep_their_order(policy, sizes, at_once):
    assert policy.draws_unequal_groups
    policy.draws_unequal_groups = at_once  # a policy of a user's own is called for each size
    made = sampler(policy, parity)
    batch = {**prompts(len(sizes), 0), "group_size": torch.tensor(sizes)}
    drawn = made.roll_out(batch, torch.Generator().manual_seed(0), True)
    assert made.cost.rollouts["training"] == sum(sizes)
    assert drawn.batch["sample_id"].tolist() == batch["sample_id"].tolist()
    assert drawn.items.shape == (len(sizes), LARGEST)
    assert drawn.exists.sum(dim=1).tolist() == sizes
    ids = policy.catalogue.item_ids
    for b, size in enumerate(sizes):
        names = [ids[item] for item in drawn.items[b, :size].tolist()]
        rewards = parity(names, [b] * size)
        assert drawn.applies[b].tolist() == [r is not None for r in rewards] + [False] * (LARGEST - size)
        assert drawn.rewards[b].tolist() == [r or 0.0 for r in rewards] + [0.0] * (LARGEST - size)
        lengths = [int((policy.trie.item_tokens[ids.index(name)] >= 0).sum()) for name in names]
        assert drawn.lengths[b].tolist() == lengths + [0] * (LARGEST - size)
    signals = signals_of([drawn], with_rewards=True)
    met = {}
    for part in signals.of_equal_size():
        assert part.group_size is None
        for sample_id, rewards in zip(part.sample_id.tolist(), part.rewards.tolist(), strict=True):
            met[sample_id] = rewards
    assert met == {b: drawn.rewards[b, :size].tolist() for b, size in enumerate(sizes) if b != 2}
    figures = figures_of([drawn])
    known = [r for b, size in enumerate(sizes) if b != 2 for r in drawn.rewards[b, :size].tolist()]
    assert float(figures["reward"]) == pytest.approx(sum(known) / len(known))
    assert float(figures["completions/mean_length"]) == pytest.approx(float(drawn.lengths.sum()) / sum(sizes))


def assert_drawn_as_alone(policy, batch, options, sizes, numbers):
    """Groups of unequal size, drawn at once, are those of each size drawn by itself, at the same cost."""
    whole = policy.roll_out({**batch, "group_size": torch.tensor(sizes)}, options, numbers)
    tokens, measured = 0, 0
    every = torch.tensor(sizes)
    for size in sorted(set(sizes)):
        rows = (every == size).nonzero().flatten()
        part = {name: value[rows] for name, value in batch.items()}
        alone = policy.roll_out(part, replace(options, num_generations=size), numbers[rows, :size])
        ours = whole.of_size(rows, size)
        assert torch.equal(ours.items, alone.items)
        assert torch.equal(ours.mask, alone.mask)
        torch.testing.assert_close(ours.logps, alone.logps)
        if alone.texts is not None:
            assert torch.equal(ours.texts, alone.texts)
        if alone.ranking is not None:
            assert torch.equal(ours.ranking.rank, alone.ranking.rank)
            torch.testing.assert_close(ours.ranking.probability, alone.ranking.probability)
        if alone.target is not None:
            for mine, wanted in zip(ours.target(), alone.target(), strict=True):
                torch.testing.assert_close(mine, wanted)
        some = torch.arange(len(rows)).flip(0)[:2]
        (*mine, n_mine), (*wanted, n_wanted) = ours.measure(some), alone.measure(some)
        for one, other in zip(mine, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        tokens, measured = tokens + alone.tokens, measured + n_wanted - n_mine
    assert (whole.tokens, measured) == (tokens, 0)
    exists = torch.arange(numbers.shape[1]) < every[:, None]
    assert not whole.mask[~exists].any()


@pytest.mark.parametrize("sizes", [*SIZES.values(), [7, 2, 2, 3]])
@pytest.mark.parametrize("narrowed", [{}, {"top_k": 2, "temperature": 1.5}])
def test_items_drawn_at_once_are_those_drawn_alone(policy, sizes, narrowed):
    batch, options = prompts(len(sizes), 3), RolloutOptions(num_generations=max(sizes), **narrowed)
    size = (len(sizes), max(sizes), policy.id_length)
    numbers = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_drawn_as_alone(policy, batch, options, sizes, numbers)


@pytest.mark.parametrize("sizes", [[3, 2, 5, 2], [2, 2, 2, 2], [5, 4, 3, 2]])
def test_texts_drawn_at_once_are_those_drawn_alone(retriever, sizes):
    options = RolloutOptions(num_generations=max(sizes))
    numbers = torch.rand((4, max(sizes), 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_drawn_as_alone(retriever, toy_batch(4), options, sizes, numbers)


def test_reference_log_probabilities_keep_their_order(policy):
    made, rollouts = sampler(policy, parity), unequal(policy, SIZES["unequal"])
    with torch.no_grad():
        logps = made.reference_logps(policy, rollouts)
        plain = PlainPolicy(policy)
        for b, size in enumerate(SIZES["unequal"]):
            history = [i for i in rollouts.batch["history"][b].tolist() if i >= 0]
            for g in range(size):
                truth = float(plain.item_logp(history, [], int(rollouts.items[b, g])))
                assert float(logps[b, g].sum()) == pytest.approx(truth, rel=1e-8)
        assert not logps[~rollouts.exists].any()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return text_policy(
        write_model(tmp_path_factory.mktemp("llama")), catalogue=toy_catalogue(), max_completion_length=4
    )


def test_a_policy_that_ranks_learns_items_of_unequal_groups(retriever):
    """Rollouts of real text; the item loss of each group is divided by its own size."""
    objective = Objective(loss_type="grpo", relabel_topk=2)
    policy = copy.deepcopy(retriever)
    made = sampler(policy, lambda completions, target_probability: list(target_probability))
    batch = toy_batch()
    n_rows = len(batch["sample_id"])
    sizes = [2 + b % 4 for b in range(n_rows)]
    (batch,) = policy.with_negatives([{**batch, "group_size": torch.tensor(sizes)}], (0, 0), None, lambda v: v)
    drawn = made.roll_out(batch, torch.Generator().manual_seed(0), False)
    objective.set_advantages([drawn])
    parameters = [p for p in policy.parameters() if p.requires_grad]
    update = objective.update(policy, drawn, step_totals([drawn], 1, 1)[0], 1.0)
    ours = torch.autograd.grad(update.loss, parameters, allow_unused=True)
    total = torch.zeros(())
    for b, size in enumerate(sizes):
        part = drawn.take(torch.tensor([b])).resized(size)
        passed = policy.completion_pass(part.batch, part.items, part.texts, 1.0)
        advantages = plain_advantages(drawn.rewards[b, :size].double().tolist(), "group", "mean")
        token = sum(-a * passed.logps[0, g][part.mask[0, g]].mean() for g, a in enumerate(advantages))
        best = sorted(range(size), key=lambda g: -advantages[g])[:2]
        ranked, _ = passed.rank_target(torch.tensor([best]), drawn.batch["target"])
        item = sum(-advantages[g] * ranked[place] for place, g in enumerate(best))
        total = total + (token + item) / size / n_rows
    truth = torch.autograd.grad(total, parameters, allow_unused=True)
    for mine, wanted in zip(ours, truth, strict=True):
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=2e-5)
