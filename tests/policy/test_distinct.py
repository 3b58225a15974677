"""Oracle: the probability of every ordered draw without replacement, from the policy's own definition in float64."""

import itertools

import pytest
import torch
from helpers.plain_policy import PlainPolicy, batch_of, many_token_policy, one_token_policy

from minirec_pl.policy.distinct import sample_distinct
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

HISTORY, SEEN, DRAWS = [1, 4], [0, 1], 6000


@pytest.fixture(params=["one token", "many tokens"])
def policy(request, tmp_path):
    return one_token_policy(7) if request.param == "one token" else many_token_policy(tmp_path / "policy", 7)


def drawn(policy, batch, group, seed=0, temperature=1.0):
    with evaluation_mode(policy):
        prompt = policy.run_prompt(batch)
        generator = torch.Generator().manual_seed(seed)
        return sample_distinct(policy, prompt, batch, group, generator, temperature)


@pytest.mark.parametrize(("group", "temperature"), [(2, 1.0), (3, 1.7)])
def test_draws_one_after_the_other_from_what_is_left(policy, group, temperature):
    p = PlainPolicy(policy).item_logps(HISTORY, SEEN, temperature).exp().tolist()
    batch = batch_of([HISTORY] * DRAWS, [SEEN] * DRAWS)
    items = drawn(policy, batch, group, temperature=temperature).items
    counts = dict.fromkeys(itertools.permutations([i for i in range(7) if i not in SEEN], group), 0)
    for row in items.tolist():
        counts[tuple(row)] += 1
    statistic = 0.0
    for order, count in counts.items():
        chance, left = 1.0, 1.0
        for item in order:
            chance, left = chance * p[item] / left, left - p[item]
        statistic += (count - DRAWS * chance) ** 2 / (DRAWS * chance)
    freedom = len(counts) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    assert len({count for count in counts.values() if count}) > 5


def test_log_probabilities_and_masks_are_those_of_the_items(policy):
    histories, seen = [[2, 3, 5], [], [6]], [[2], [5, 6], [0, 1]]
    batch = batch_of(histories, seen)
    rollouts = drawn(policy, batch, 4, temperature=0.8)
    plain = PlainPolicy(policy)
    for b, (history, masked) in enumerate(zip(histories, seen, strict=True)):
        items = rollouts.items[b].tolist()
        assert len(set(items)) == 4
        assert not set(items) & set(masked)
        for g, item in enumerate(items):
            steps = [float(logp.detach()) for logp, _ in plain.steps(history, masked, item, 0.8)]
            assert rollouts.mask[b, g].tolist() == [True] * len(steps) + [False] * (policy.id_length - len(steps))
            assert rollouts.logps[b, g, : len(steps)].tolist() == pytest.approx(steps, abs=1e-4)
            assert not rollouts.logps[b, g, len(steps) :].any()


def test_a_group_of_all_that_is_left(policy):
    items = drawn(policy, batch_of([HISTORY], [SEEN]), 5).items[0].tolist()
    assert sorted(items) == [2, 3, 4, 5, 6]


def test_the_generator_decides(policy):
    batch = batch_of([HISTORY, []], [SEEN, []])
    one, two, other = (drawn(policy, batch, 3, seed).items for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_too_few_items_and_diverged_weights(policy):
    with pytest.raises(InputError, match=r"num_generations is 6 but sample_id 101 has only 5 items left .* lower it"):
        drawn(policy, batch_of([[], HISTORY], [[], SEEN]), 6)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN: its weights have diverged"):
        drawn(policy, batch_of([HISTORY], [SEEN]), 2)
