import copy

import pytest
import torch
from helpers.plain_policy import CONFIG, PlainPolicy, batch_of, many_token_policy, one_token_policy
from scipy.stats import chisquare

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy

HISTORIES = [[3], [0, 5, 2, 7], [0, 5, 2, 7], [], [11, 1]]
SEEN = [[3], [0, 5, 2, 7, 9], [0, 5, 2, 7], [], [1, 11, 0, 2, 3, 4, 5, 6, 7, 8]]
ITEMS = torch.tensor([[0, 5, 11], [1, 3, 1], [1, 8, 9], [2, 0, 7], [9, 10, 9]])


@pytest.fixture(params=["one token", "many tokens"])
def policy(request, tmp_path):
    return one_token_policy() if request.param == "one token" else many_token_policy(tmp_path / "policy")


def rows():
    return zip(HISTORIES, SEEN, strict=True)


def watch_fed_tokens(policy):
    """A list that fills with the number of real tokens of each forward pass."""
    fed = []

    def note(module, args, kwargs):
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        fed.append(None if mask is None else int(mask[:, -tokens.shape[1] :].sum()))

    policy.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return fed


def unique_prefix(policy, item):
    """Tokens it takes to tell an item from all others: those after them are certain."""
    ids = [tuple(t for t in row if t >= 0) for row in policy.trie.item_tokens.tolist()]
    own = ids.pop(item)
    return next(n for n in range(1, len(own) + 1) if all(tokens[:n] != own[:n] for tokens in ids))


def test_prompts_are_a_start_token_and_the_ids_oldest_first(tmp_path):
    policy = many_token_policy(tmp_path / "policy", 4)
    ids = [[t for t in row if t >= 0] for row in policy.trie.item_tokens.tolist()]
    tokens, mask, row = policy.encode({"history": torch.tensor([[-1, 2], [3, 0], [3, 0], [1, -1]])})
    assert row.tolist() == [0, 1, 1, 2]
    for row, items in zip(range(3), ([2], [3, 0], [1]), strict=True):
        expected = [1, *(token for item in items for token in ids[item])]
        padding = tokens.shape[1] - len(expected)
        assert tokens[row].tolist() == [0] * padding + expected
        assert mask[row].tolist() == [0] * padding + [1] * len(expected)
    assert tokens.shape[1] == int(mask.sum(dim=1).max())


def test_item_logps_equal_an_unpadded_loop_and_sum_to_one(policy):
    plain = PlainPolicy(policy)
    scores = policy.item_logps(batch_of(HISTORIES, SEEN), chunk=16)
    assert scores.dtype == torch.float32
    for score, (history, seen) in zip(scores, rows(), strict=True):
        truth = plain.item_logps(history, seen)
        open_ = truth.isfinite()
        torch.testing.assert_close(score[open_].double(), truth[open_], rtol=0, atol=2e-5)
        assert float(score[open_].double().exp().sum()) == pytest.approx(1, abs=1e-5)
        assert score[~open_].tolist() == [torch.finfo(torch.float32).min] * int((~open_).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_completion_logps_equal_an_unpadded_loop(policy, temperature):
    plain = PlainPolicy(policy)
    logps, mask, entropy = policy.completion_logps(batch_of(HISTORIES, SEEN), ITEMS, temperature)
    assert logps.shape == mask.shape == entropy.shape == (5, 3, policy.id_length)
    for b, (history, seen) in enumerate(rows()):
        for g, item in enumerate(ITEMS[b].tolist()):
            steps = plain.steps(history, seen, item, temperature)
            n = len(steps)
            assert mask[b, g].tolist() == [True] * n + [False] * (policy.id_length - n)
            for ours, which in ((logps, 0), (entropy, 1)):
                truth = torch.stack([step[which] for step in steps]).detach()
                torch.testing.assert_close(ours[b, g, :n].detach().double(), truth, rtol=0, atol=2e-5)
                assert not ours[b, g, n:].any()
    assert logps.requires_grad
    assert not entropy.requires_grad


def test_a_row_does_not_depend_on_its_batch(policy):
    together = policy.item_logps(batch_of(HISTORIES, SEEN))
    for b, (history, seen) in enumerate(rows()):
        torch.testing.assert_close(policy.item_logps(batch_of([history], [seen]))[0], together[b], rtol=0, atol=2e-5)


def test_gradients_are_those_of_single_samples_though_equal_prompts_run_once(policy):
    weight = torch.randn(ITEMS.shape, generator=torch.Generator().manual_seed(0))
    (policy.completion_logps(batch_of(HISTORIES, SEEN), ITEMS)[0].sum(dim=-1) * weight).sum().backward()
    plain = PlainPolicy(policy)
    for b, (history, seen) in enumerate(rows()):
        for g, item in enumerate(ITEMS[b].tolist()):
            (plain.item_logp(history, seen, item) * float(weight[b, g])).backward()
    for (name, ours), truth in zip(policy.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def test_prompts_can_be_used_again(policy):
    batch = batch_of(HISTORIES, SEEN)
    with torch.no_grad():
        prompt = policy.run_prompt(batch)
        uniform = torch.rand(5, 3, policy.id_length, dtype=torch.float64)
        first = policy.sample(prompt, batch["seen"], uniform)
        second = policy.sample(prompt, batch["seen"], uniform)
        states = policy.completion_states(prompt, ITEMS)
    assert torch.equal(first.items, second.items)
    expected = policy.completion_logps(batch, ITEMS)[0]
    torch.testing.assert_close(policy.head_logps(states, ITEMS, batch["seen"])[0], expected)


def test_equal_neighbours_run_once_and_count_once(policy):
    fed = watch_fed_tokens(policy)
    batch = batch_of(HISTORIES, SEEN)
    policy.run_prompt(batch)
    ids = [sum(t >= 0 for t in row) for row in policy.trie.item_tokens.tolist()]
    hand = sum(1 + sum(ids[item] for item in history) for b, history in enumerate(HISTORIES) if b != 2)
    assert policy.prompt_tokens(batch) == sum(fed) == hand
    fed.clear()
    policy.completion_logps(batch, ITEMS)
    alone = [unique_prefix(policy, item) for item in ITEMS.flatten().tolist()]
    assert policy.fed_tokens(ITEMS) == sum(fed) - hand == sum(alone) - len(alone)
    fed.clear()
    items = policy.generate(batch, 6, generator=torch.Generator().manual_seed(0)).items
    assert sum(fed) - hand == policy.fed_tokens(items)


def test_rollouts_carry_their_log_probabilities_and_never_seen_items(policy):
    batch = batch_of(HISTORIES, SEEN)
    rollouts = policy.generate(batch, 40, temperature=1.5, generator=torch.Generator().manual_seed(3))
    logps, mask, _ = policy.completion_logps(batch, rollouts.items, 1.5)
    torch.testing.assert_close(rollouts.logps, logps.detach(), rtol=0, atol=2e-5)
    assert torch.equal(rollouts.mask, mask)
    for items, seen in zip(rollouts.items.tolist(), SEEN, strict=True):
        assert not set(items) & set(seen)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_frequencies_follow_the_exact_probabilities(policy, temperature):
    history, seen, n = [0, 5, 2], [0, 5, 2, 9], 20_000
    rollouts = policy.generate(
        batch_of([history], [seen]), n, temperature=temperature, generator=torch.Generator().manual_seed(11)
    )
    expected = PlainPolicy(policy).item_logps(history, seen, temperature).exp() * n
    counts = torch.bincount(rollouts.items.flatten(), minlength=12)
    assert counts[seen].sum() == 0
    often = expected > 5
    assert int(often.sum()) >= 4
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    wanted = [*expected[often].tolist(), max(float(expected[~often].sum()), 1e-9)]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], [w * sum(observed[:-1]) / sum(wanted[:-1]) for w in wanted[:-1]]
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_top_k_and_top_p_bound_every_token(policy):
    batch, plain = batch_of(HISTORIES, SEEN), PlainPolicy(policy)
    greedy = policy.generate(batch, 3, top_k=1).items
    assert torch.equal(greedy, policy.generate(batch, 3, top_p=1e-6).items)
    for b, (history, seen) in enumerate(rows()):
        prefix, open_ids = (), [ids for i, ids in enumerate(plain.ids) if i not in seen]
        while prefix not in plain.ids:
            allowed = sorted({ids[len(prefix)] for ids in open_ids if ids[: len(prefix)] == prefix})
            best = plain.next_logits([*plain.prompt(history), *prefix])[allowed].argmax()
            prefix = (*prefix, allowed[int(best)])
        assert set(greedy[b].tolist()) == {plain.ids.index(prefix)}
    assert policy.generate(batch, 3, top_k=1).logps.abs().max() < 1e-6


def test_generation_is_determined_by_its_generator_and_leaves_the_global_one(policy):
    batch = batch_of(HISTORIES, SEEN)
    state = torch.get_rng_state()
    a, b, c = (policy.generate(batch, 20, generator=torch.Generator().manual_seed(s)).items for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_a_rollout_depends_on_its_own_numbers_alone(policy):
    uniform = torch.rand(5, 8, policy.id_length, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    batch = batch_of(HISTORIES, SEEN)
    together = policy.sample(policy.run_prompt(batch), batch["seen"], uniform).items
    for b in range(5):
        alone = batch_of([HISTORIES[b]], [SEEN[b]])
        items = policy.sample(policy.run_prompt(alone), alone["seen"], uniform[b : b + 1]).items
        assert torch.equal(items[0], together[b])


@pytest.mark.parametrize("width", [2, 7])
def test_beams_are_those_of_a_plain_search(policy, width):
    batch, plain = batch_of(HISTORIES[:4], SEEN[:4]), PlainPolicy(policy)
    with torch.no_grad():
        rollouts = policy.beams(policy.run_prompt(batch), batch["seen"], width, 1.5)
    logps, mask, _ = policy.completion_logps(batch, rollouts.items, 1.5)
    torch.testing.assert_close(rollouts.logps, logps.detach(), rtol=0, atol=2e-5)
    assert torch.equal(rollouts.mask, mask)
    for b, (history, seen) in enumerate(zip(HISTORIES[:4], SEEN[:4], strict=True)):
        open_ids = [ids for i, ids in enumerate(plain.ids) if i not in seen]
        beams = [((), 0.0)]
        for _ in range(policy.id_length):
            pool = [beam for beam in beams if beam[0] in open_ids]
            for prefix, total in beams:
                if prefix in open_ids:
                    continue
                depth = len(prefix)
                allowed = sorted({ids[depth] for ids in open_ids if ids[:depth] == prefix})
                logits = plain.next_logits([*plain.prompt(history), *prefix]).detach()[allowed]
                steps = zip(allowed, (logits / 1.5).log_softmax(dim=0).tolist(), strict=True)
                pool += [((*prefix, token), total + logp) for token, logp in steps]
            beams = sorted(pool, key=lambda beam: -beam[1])[:width]
        assert rollouts.items[b].tolist() == [plain.ids.index(prefix) for prefix, _ in beams]


def test_more_beams_than_items_are_left(policy):
    batch = batch_of(HISTORIES, SEEN)
    with pytest.raises(InputError, match="2 items left for 3 beams: lower num_generations"):
        policy.beams(policy.run_prompt(batch), batch["seen"], 3)


def test_no_dropout_in_generation_and_evaluation_and_the_mode_is_put_back():
    policy = one_token_policy(attention_dropout=0.5).train()
    batch = batch_of(HISTORIES, SEEN)
    noisy = [policy.completion_logps(batch, ITEMS)[0] for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(policy.item_logps(batch), policy.item_logps(batch))
    policy.generate(batch, 2)
    assert all(module.training for module in policy.modules())


def test_warm_start_loss_equals_a_loop_over_pairs_with_a_strict_prefix(policy):
    sequence = torch.tensor([[4, 2, 7, 7, 1], [3, 0, -1, -1, -1], [9, 8, 6, -1, -1]])
    pairs = [(0, 0, 2), (0, 0, 7), (0, 2, 1), (1, 0, 0), (2, 1, 6)]
    row, position, target = map(torch.tensor, zip(*pairs, strict=True))
    batch = {"sequence": sequence, "row": row, "position": position, "target": target}
    plain = PlainPolicy(policy)
    truth = -sum(plain.item_logp(sequence[r, : p + 1].tolist(), [], t) for r, p, t in pairs) / len(pairs)
    loss = policy.sequence_nll(batch)
    assert loss.item() == pytest.approx(truth.item(), abs=2e-5)
    loss.backward()
    truth.backward()
    for ours, theirs in zip(policy.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
    later = {**batch, "sequence": sequence.clone()}
    later["sequence"][0, 3:], later["sequence"][1, 1:], later["sequence"][2, 2:] = 5, 5, 5
    assert policy.sequence_nll(later).item() == pytest.approx(loss.item(), abs=1e-6)


def test_warm_start_tokens_are_those_fed(policy):
    fed = watch_fed_tokens(policy)
    sequence = torch.tensor([[4, 2, 7], [3, 0, -1]])
    row, position, target = torch.tensor([[0, 0, 2], [0, 1, 7], [1, 0, 0]]).T
    batch = {"sequence": sequence, "row": row, "position": position, "target": target}
    policy.sequence_nll(batch)
    if policy.id_length == 1:
        assert policy.sequence_tokens(batch) == 2 + 5
    else:
        assert policy.sequence_tokens(batch) == sum(fed)


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
GEMMA2 = {**CONFIG, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0}


@pytest.mark.parametrize("config", [GPT2, GEMMA2], ids=["gpt2", "gemma2"])
def test_works_with_another_architecture(config):
    policy = GenerativePolicy(config=config)
    policy.bind(Catalogue(list("abcdefghijkl")))
    policy.eval()
    truth = PlainPolicy(policy).item_logps(HISTORIES[1], SEEN[1])
    ours = policy.item_logps(batch_of(HISTORIES, SEEN))[1]
    torch.testing.assert_close(ours[truth.isfinite()].double(), truth[truth.isfinite()], rtol=0, atol=2e-5)


def test_a_prompt_longer_than_the_model(tmp_path):
    for policy, longest in (
        (one_token_policy(max_position_embeddings=4), 5),
        (many_token_policy(tmp_path / "policy", max_position_embeddings=4), None),
    ):
        histories = [[0], [0, 1, 2, 3], [0, 1, 2, 3], [2]]
        message = f"prompt and item id of sample 101 take {longest or ''}.* has 4 positions: lower data.history"
        with pytest.raises(InputError, match=message):
            policy.item_logps(batch_of(histories, [[0]] * 4))


def test_diverged_weights_are_named():
    policy = one_token_policy()
    with torch.no_grad():
        next(policy.model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="lower the learning rate"):
        policy.generate(batch_of(HISTORIES, SEEN), 2)


def test_exactly_one_of_folder_and_config():
    for options in ({}, {"pretrained": "somewhere", "config": CONFIG}):
        with pytest.raises(InputError, match="exactly one of `pretrained`"):
            GenerativePolicy(**options)


def test_a_policy_of_another_catalogue():
    policy = one_token_policy(12)
    policy.bind(Catalogue([f"i{i}" for i in range(12)]))
    for other in ([f"i{i}" for i in range(13)], [f"i{i}" for i in range(11, -1, -1)]):
        with pytest.raises(InputError, match=f"trained for a catalogue of 12 items and the data has {len(other)}"):
            policy.bind(Catalogue(other))


def test_a_policy_without_a_catalogue_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="call bind"):
        GenerativePolicy(config=CONFIG).save_pretrained(tmp_path / "policy")


def test_deepcopy_is_independent():
    policy = one_token_policy()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1.0)
    batch = batch_of(HISTORIES, SEEN)
    assert not torch.equal(policy.item_logps(batch), other.item_logps(batch))


def test_warm_start_dropout_works_in_training_only():
    policy = one_token_policy()
    row, position, target = torch.tensor([[0, 0, 2], [0, 1, 7]]).T
    batch = {"sequence": torch.tensor([[4, 2, 7]]), "row": row, "position": position, "target": target}
    plain = policy.sequence_nll(batch).item()
    assert policy.sequence_nll(batch, dropout=0.5).item() != policy.sequence_nll(batch, dropout=0.5).item()
    policy.eval()
    assert policy.sequence_nll(batch, dropout=0.5).item() == plain


@pytest.mark.slow
def test_gradients_are_the_same_each_time_on_two_threads(toy_data, tiny_policy):
    """Indexing with a gradient adds up in no fixed order on several threads; two runs with one seed would differ."""
    n_items, pairs = len(tiny_policy().catalogue), 4000
    random = torch.Generator().manual_seed(0)
    batch = {
        "sequence": torch.randint(n_items, (16, 50), generator=random),
        "row": torch.randint(2, (pairs,), generator=random),
        "position": torch.randint(2, (pairs,), generator=random),
        "target": torch.randint(n_items, (pairs,), generator=random),
    }
    policy = tiny_policy(hidden_size=64, intermediate_size=64)

    def gradients():
        loss = policy.sequence_nll(batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        assert all(torch.equal(gradients(), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)
