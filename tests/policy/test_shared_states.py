"""Prompts that others begin with: run once, with the same states, probabilities and gradients."""

import itertools

import numpy as np
import pytest
import torch
from helpers.chat_models import chat_policy
from helpers.plain_policy import PlainPolicy, batch_of, one_token_policy

from minirec_pl import GRPORecModule
from minirec_pl.data.batches import SampleDataset
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.data.samples import Catalogue, SampleTable
from minirec_pl.policy import GenerativePolicy, PromptTemplate

HISTORIES = [[1, 2, 3, 4], [1, 2], [5], [1, 2, 3], [1, 2], [5, 6, 7]]
SEEN = [[1, 2, 3, 4], [1, 2], [5], [1, 2, 3], [0, 1, 2], [5, 6, 7]]
TARGETS = [6, 3, 6, 4, 3, 8]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_and_gradients_are_those_of_single_prompts(family):
    policy = one_token_policy() if family == "llama" else gpt2()
    batch = batch_of(HISTORIES, SEEN, TARGETS)
    plain = PlainPolicy(policy)
    passed = policy.target_pass(batch, 1.3)
    wanted = [plain.item_logp(h, s, t, 1.3) for h, s, t in zip(HISTORIES, SEEN, TARGETS, strict=True)]
    torch.testing.assert_close(passed.logp.double(), torch.stack(wanted).detach(), rtol=1e-5, atol=1e-6)
    assert passed.tokens == 5 + 4  # a start token each, [1, 2, 3, 4] and [5, 6, 7]
    weights = torch.arange(1.0, 7.0)
    (passed.logp * weights).sum().backward()
    (torch.stack(wanted) * weights).sum().backward()
    for ours, theirs in zip(policy.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def gpt2():
    torch.manual_seed(0)
    policy = GenerativePolicy(
        config={"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0}
    )
    policy.bind(Catalogue([f"i{i}" for i in range(12)]))
    return policy.eval()


def test_a_chat_that_ends_with_the_list_runs_a_user_once(tmp_path):
    prompt = PromptTemplate(system="", user="Go on:", answer="{history}", item="{title}", age="")
    policy = chat_policy(tmp_path / "model", item_ids="token", prompt=prompt)
    histories = [[0, 1, 2], [0, 1], [0], [2]]
    batch = batch_of(histories, histories, [3, 3, 3, 3])
    found = policy.target_pass(batch, 1.0)
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(found.logp[row], policy.item_logps(alone)[0, 3], rtol=1e-4, atol=1e-4)
    single = [policy.prompt_tokens({n: v[row : row + 1] for n, v in batch.items()}) for row in range(4)]
    assert found.tokens == single[0] + single[3]


def table():
    """Three users with 5, 12 and 3 interactions, in turn."""
    users = ["a"] * 5 + ["b"] * 12 + ["c"] * 3
    return SampleTable(users, list(range(20)), [float(i) for i in range(20)], n_items=20)


def test_histories_that_begin_at_the_same_item_are_beginnings_of_each_other():
    made = SampleDataset(table(), 4, np.arange(20), "all", stride=2)
    for ids, begins in (([6, 7, 8, 9], 5), ([10, 11], 7), ([12, 13], 9)):
        batch = made.__getitems__(ids)
        for sample_id, row in zip(ids, batch["history"].tolist(), strict=True):
            assert [item for item in row if item >= 0] == list(range(begins, sample_id))
    plain = SampleDataset(table(), 4, np.arange(20), "all").__getitems__([12])["history"][0].tolist()
    assert plain == [8, 9, 10, 11]


def test_samples_of_a_user_come_together_where_the_first_would():
    sampler = CurriculumSampler(range(20), together=table().user)
    sampler.set_plan([18, 3, 7, 1, 19, 9, 2])
    assert list(sampler) == [18, 19, 3, 1, 2, 7, 9]
    assert sampler.plan == [18, 3, 7, 1, 19, 9, 2]
    sampler.set_plan(None)
    assert sorted(sampler) == list(range(20))
    users = [int(table().user[sample_id]) for sample_id in sampler]
    assert sum(one != other for one, other in itertools.pairwise(users)) == 2


def test_whole_sequences_train_on_the_same_samples_for_fewer_tokens(tiny_policy, toy_data, make_trainer):
    spent, met = {}, {}
    for whole in (False, True):
        module = GRPORecModule(tiny_policy(), rollouts="expected", scoring_generations=0)
        data = toy_data(whole_sequences=whole, batch_size=64)
        trained = []
        step = module.training_step
        module.training_step = lambda batch, index, step=step, trained=trained: (
            trained.append(batch["sample_id"]) or step(batch, index)
        )
        make_trainer(max_epochs=1).fit(module, data)
        met[whole] = sorted(torch.cat(trained).tolist())
        spent[whole] = module.cost.tokens_backward["training"]
    assert met[True] == met[False]
    assert spent[True] < spent[False] / 2
