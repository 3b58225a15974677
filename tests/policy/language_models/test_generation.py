from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_llm import EOS, KINDS, PAD, PlainModel, prompts, rows_of, tiny_llm
from scipy.stats import chisquare
from transformers import (
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minirec_pl import InputError
from minirec_pl.grpo.loss import eos_mask
from minirec_pl.policy.language_models.causal_lm import body_of, head_of, run_prompts
from minirec_pl.policy.language_models.decoding import decode, decode_beams
from minirec_pl.policy.language_models.generation import Sampling, VocabularyHead, eos_token_ids, generate
from minirec_pl.policy.language_models.model_support import support_of
from minirec_pl.policy.language_models.sampling import rollout_generator
from minirec_pl.policy.trie import TokenTrie, TrieHead
from minirec_pl.utils.modules import evaluation_mode

GREEDY = Sampling("greedy")


def sampled(model, ids, mask, group=6, length=10, seed=0, **options):
    return generate(model, ids, mask, group, length, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_gives_the_tokens_of_transformers(kind):
    model = tiny_llm(kind, seed=3)
    ids, mask = prompts(9, 2, 30, 5)
    ours = generate(model, ids, mask, 2, 12, sampling=GREEDY)
    for row, prompt in enumerate(rows_of(ids, mask)):
        prompt = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": list(EOS)}
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        for completion, real in zip(ours.ids[row], ours.mask[row], strict=True):
            assert completion[real].tolist() == theirs.tolist()


def test_every_end_of_sequence_ends_a_completion_and_is_in_the_mask():
    ids, mask = prompts(4, 7)
    made = sampled(tiny_llm(), ids, mask, group=64, length=20)
    assert torch.equal(made.mask, eos_mask(made.ids, EOS))
    lengths = made.mask.sum(dim=-1)
    last = made.ids.gather(2, lengths[..., None] - 1).squeeze(-1)[lengths < 20]
    assert set(last.tolist()) == set(EOS)
    assert made.ids[~made.mask].eq(PAD).all()
    assert made.logps[~made.mask].eq(0).all()
    assert lengths.float().std() > 1


def test_ended_completions_leave_the_batch():
    model, fed = tiny_llm(), []
    support_of(model)
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: fed.append(given["input_ids"].shape), with_kwargs=True
    )
    ids, mask = prompts(6, 6)
    made = sampled(model, ids, mask, group=32, length=20)
    lengths = made.mask.sum(dim=-1)
    assert fed[0] == (2, 6)
    assert [rows for rows, _ in fed[1:]] == [int((lengths > step).sum()) for step in range(1, len(fed))]
    assert len(fed) == int(lengths.max())


def test_a_batch_that_ends_early_is_as_short_as_its_longest_completion():
    ids, mask = prompts(3)
    made = sampled(tiny_llm(), ids, mask, group=3, length=100)
    assert made.ids.shape[2] == int(made.mask.sum(dim=-1).max()) < 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gets_the_same_alone_as_among_others(kind):
    model = tiny_llm(kind)
    ids, mask = prompts(3, 26, 7, 25, 8)
    uniform = torch.rand(5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = generate(model, ids, mask, 4, 8, uniform=uniform)
    for row, prompt in enumerate(rows_of(ids, mask)):
        prompt = torch.tensor([prompt])
        alone = generate(model, prompt, torch.ones_like(prompt), 4, 8, uniform=uniform[row : row + 1])
        length = alone.ids.shape[2]
        assert torch.equal(alone.ids[0], together.ids[row, :, :length])
        torch.testing.assert_close(alone.logps[0], together.logps[row, :, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}, {"top_k": 4}, {"top_p": 0.6, "temperature": 0.8}])
def test_frequencies_of_two_tokens_follow_the_exact_probabilities(options):
    model, n = tiny_llm(vocabulary=9), 20_000
    ids, mask = prompts(5, vocabulary=9)
    made = sampled(model, ids, mask, group=n, length=2, sampling=Sampling(**options))
    plain, prompt = PlainModel(model), rows_of(ids, mask)[0]
    expected = {}
    with torch.no_grad():
        first = filtered(plain.next_logits(prompt)[None], [prompt], **options)[0]
        for token in range(9):
            if token in EOS or first[token] == 0:
                expected[token, PAD] = float(first[token])
                continue
            second = filtered(plain.next_logits([*prompt, token])[None], [[*prompt, token]], **options)[0]
            expected |= {(token, after): float(first[token] * second[after]) for after in range(9)}
    counts = dict.fromkeys(expected, 0)
    for pair in made.ids[0].tolist():
        counts[tuple(pair)] += 1
    assert not any(counts[pair] for pair, share in expected.items() if share == 0)
    often = [pair for pair, share in expected.items() if share * n >= 5]
    observed, wanted = [counts[pair] for pair in often], [expected[pair] * n for pair in often]
    rest = n - sum(wanted)
    if rest >= 5:
        observed, wanted = [*observed, n - sum(observed)], [*wanted, rest]
    scale = sum(observed) / sum(wanted)
    assert chisquare(observed, [value * scale for value in wanted]).pvalue > 1e-3


def filtered(logits, sequences, temperature=1.0, top_k=None, top_p=None):
    """Probabilities after the processors of transformers, in its order."""
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p else []
    for processor in chain:
        logits = processor(torch.tensor(sequences), logits)
    return logits.softmax(dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.5},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9},
    ],
)
def test_log_probabilities_are_those_of_the_processors_of_transformers(options):
    model = tiny_llm()
    ids, mask = prompts(8, 3, 30)
    made = sampled(model, ids, mask, group=3, sampling=Sampling(**options))
    plain = PlainModel(model)
    for row, prompt in enumerate(rows_of(ids, mask)):
        for completion, real, logps in zip(made.ids[row], made.mask[row], made.logps[row], strict=True):
            tokens = completion[real].tolist()
            for step, (token, logp) in enumerate(zip(tokens, logps.tolist(), strict=False)):
                known = [*prompt, *tokens[:step]]
                with torch.no_grad():
                    share = filtered(plain.next_logits(known)[None], [known], **options)[0, token]
                assert logp == pytest.approx(float(share.log()), abs=2e-5)


def test_a_run_is_determined_by_its_words_and_ranks_differ():
    model, state = tiny_llm(), torch.get_rng_state()
    ids, mask = prompts(4, 9)
    words = [(42, 0, 7, 0), (42, 0, 7, 0), (42, 0, 7, 1), (42, 0, 8, 0), (42, 1, 7, 0), (43, 0, 7, 0)]
    runs = [generate(model, ids, mask, 4, 8, generator=rollout_generator(*word)) for word in words]
    assert torch.equal(runs[0].ids, runs[1].ids)
    assert torch.equal(runs[0].logps, runs[1].logps)
    assert not any(torch.equal(runs[0].logps, other.logps) for other in runs[2:])
    assert torch.equal(state, torch.get_rng_state())


def test_random_numbers_of_one_row_change_that_row_alone():
    model = tiny_llm()
    ids, mask = prompts(4, 9)
    uniform = torch.rand(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = generate(model, ids, mask, 3, 8, uniform=uniform)
    uniform[1, 1] = 1 - uniform[1, 1]
    after = generate(model, ids, mask, 3, 8, uniform=uniform)
    length = min(before.ids.shape[2], after.ids.shape[2])
    same = (before.ids[:, :, :length] == after.ids[:, :, :length]).all(dim=-1)
    assert same.tolist() == [[True] * 3, [True, False, True]]


def test_dropout_plays_no_part_and_the_mode_is_put_back():
    model = tiny_llm("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    ids, mask = prompts(4, 9)
    expected = sampled(model, ids, mask)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    found = sampled(model, ids, mask)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logps, expected.logps)
    assert [module.training for module in model.modules()] == modes
    assert not found.logps.requires_grad


def test_the_mode_is_put_back_after_an_exception():
    model = tiny_llm().train()
    ids, mask = prompts(4)
    support_of(model)

    def broken(module, args, states):
        assert not model.training
        raise KeyError("in the model")

    hook = model.base_model.register_forward_hook(broken)
    with pytest.raises(KeyError):
        generate(model, ids, mask, 2, 4)
    hook.remove()
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_does_not_change_generation():
    model = tiny_llm()
    ids, mask = prompts(4, 9)
    expected = sampled(model, ids, mask)
    model.gradient_checkpointing_enable()
    model.train()
    found = sampled(model, ids, mask)
    assert torch.equal(found.ids, expected.ids)
    assert model.is_gradient_checkpointing


def test_bfloat16_is_close_to_float32():
    ids, mask = prompts(4, 9)
    half = tiny_llm().to(torch.bfloat16)
    full = tiny_llm().to(torch.bfloat16).float()
    made, expected = sampled(half, ids, mask), sampled(full, ids, mask)
    same = (made.ids == expected.ids)[..., 0]
    assert same.float().mean() > 0.8
    torch.testing.assert_close(made.logps[..., 0][same], expected.logps[..., 0][same], rtol=0.05, atol=0.05)
    assert half.dtype == torch.bfloat16


def test_a_trie_gives_items_with_their_exact_probabilities():
    model, n = tiny_llm(), 4000
    items = torch.tensor([[7, 8, -1], [7, 9, 10], [7, 9, 11], [12, -1, -1], [13, 8, 8]])
    ids, mask = prompts(5)
    trie = TokenTrie(items)
    head = TrieHead(head_of(model), trie, torch.full((1, 1), -1))
    with evaluation_mode(model):
        numbers = torch.rand(1, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        made = decode(run_prompts(body_of(model), ids, mask), head, n, 3, numbers)
    drawn = items[trie.items_of(made.tokens.masked_fill(~made.mask, -1))]
    found = [tuple(token for token in row if token >= 0) for row in drawn.tolist()]
    names = [tuple(token for token in row if token >= 0) for row in items.tolist()]
    assert set(found) <= set(names)
    plain, prompt, expected = PlainModel(model), rows_of(ids, mask)[0], []
    with torch.no_grad():
        for name in names:
            share = 1.0
            for depth, token in enumerate(name):
                allowed = sorted({other[depth] for other in names if other[:depth] == name[:depth]})
                logps = plain.next_logits([*prompt, *name[:depth]])[allowed].log_softmax(dim=-1)
                share *= float(logps[allowed.index(token)].exp())
            expected.append(share * n)
    assert chisquare([found.count(name) for name in names], expected).pvalue > 1e-3


def beams(model, ids, mask, width, length, temperature=1.0):
    """Tokens, mask and log-probabilities [B, width, length] of a beam search over the vocabulary."""
    head = VocabularyHead(head_of(model), Sampling(temperature=temperature), EOS)
    with evaluation_mode(model):
        made = decode_beams(run_prompts(body_of(model), ids, mask), head, width, length)
    return [part.view(len(ids), width, length) for part in (made.tokens, made.mask, made.logps)]


def enumerated(plain, prompt, length, vocabulary):
    """Every completion of at most `length` tokens, with its log-probability."""
    found, open_ = [], [((), 0.0)]
    for step in range(length):
        longer = []
        for tokens, total in open_:
            logps = plain.next_logits([*prompt, *tokens]).log_softmax(dim=-1).tolist()
            longer += [((*tokens, token), total + logps[token]) for token in range(vocabulary)]
        done = [pair for pair in longer if pair[0][-1] in EOS or step + 1 == length]
        found += done
        open_ = [pair for pair in longer if pair not in done]
    return sorted(found, key=lambda pair: -pair[1])


def test_a_wide_beam_finds_the_most_likely_completions():
    model = tiny_llm(vocabulary=7)
    ids, mask = prompts(5, 3, vocabulary=7)
    tokens_of, real_of, logps_of = beams(model, ids, mask, 49, 3)
    for row, prompt in enumerate(rows_of(ids, mask)):
        with torch.no_grad():
            best = enumerated(PlainModel(model), prompt, 3, 7)[:49]
        completions = zip(tokens_of[row], real_of[row], logps_of[row], strict=True)
        found = [(tuple(tokens[real].tolist()), float(logps.sum())) for tokens, real, logps in completions]
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in best]
        assert [total for _, total in found] == pytest.approx([total for _, total in best], abs=1e-4)


def test_a_narrow_beam_is_that_of_a_plain_search():
    model, width, length = tiny_llm(), 4, 6
    ids, mask = prompts(5, 14)
    tokens_of, real_of, _ = beams(model, ids, mask, width, length, 1.3)
    plain = PlainModel(model)
    for row, prompt in enumerate(rows_of(ids, mask)):
        best = [((), 0.0)]
        for _ in range(length):
            pool = []
            for tokens, total in best:
                if tokens and tokens[-1] in EOS:
                    pool.append((tokens, total))
                    continue
                with torch.no_grad():
                    logps = (plain.next_logits([*prompt, *tokens]) / 1.3).log_softmax(dim=-1)
                pool += [((*tokens, token), total + float(logp)) for token, logp in enumerate(logps)]
            best = sorted(pool, key=lambda pair: -pair[1])[:width]
        found = [tuple(t[real].tolist()) for t, real in zip(tokens_of[row], real_of[row], strict=True)]
        assert found == [tokens for tokens, _ in best]


def test_a_beam_is_wider_than_what_a_trie_holds():
    ids, mask = prompts(5)
    items = torch.tensor([[7, 8], [7, 9], [12, 7]])
    model, trie = tiny_llm(), TokenTrie(items)
    with evaluation_mode(model):
        head = TrieHead(head_of(model), trie, torch.full((1, 1), -1))
        made = decode_beams(run_prompts(body_of(model), ids, mask), head, 5, 2)
    assert sorted(trie.items_of(made.tokens.masked_fill(~made.mask, -1))[:3].tolist()) == [0, 1, 2]
    assert made.mask.any(dim=1).tolist() == [True] * 3 + [False] * 2


def test_works_inside_peft():
    peft = pytest.importorskip("peft")
    ids, mask = prompts(4, 9)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(tiny_llm(), peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    torch.testing.assert_close(sampled(model, ids, mask).logps, sampled(tiny_llm(), ids, mask).logps)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = tiny_llm()
    merged.load_state_dict(dict(plain_weights(model)))
    found, expected = sampled(model.train(), ids, mask), sampled(merged, ids, mask)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=1e-4)
    assert model.training


def plain_weights(model):
    """The weights of a LoRA model with the adapters added in."""
    for name, value in model.get_base_model().state_dict().items():
        if "lora" in name:
            continue
        if ".base_layer" not in name:
            yield name, value
            continue
        layer = model.get_base_model().get_submodule(name.split(".base_layer")[0])
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield name.replace(".base_layer", ""), value + layer.scaling["default"] * (b @ a)


def test_ends_of_sequence_come_from_the_generation_config_first():
    model = tiny_llm()
    model.generation_config.eos_token_id = 4
    assert eos_token_ids(model) == [4]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model) == list(EOS)
    assert eos_token_ids(SimpleNamespace(config=SimpleNamespace(eos_token_id=None))) == []


def test_bad_requests():
    model = tiny_llm()
    ids, mask = prompts(3, 126)
    for arguments, message in (
        ((ids, mask, 2, 3), "prompt 1 of the batch has 126 tokens, and with 3 new ones .* 128 positions"),
        ((ids, mask.flip(1), 2, 3), "prompt 0 of the batch is empty or padded on the right"),
        ((ids, mask[:, :1], 2, 3), "give .B, T. each"),
        ((ids[:, :0], mask[:, :0], 2, 3), "give .B, T. each"),
        ((ids, mask, 0, 3), "at least 1"),
        ((ids, mask, 2, 0), "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            generate(model, *arguments)
    with pytest.raises(InputError, match=r"give \(2, 2, 2\), one for each token"):
        generate(model, ids, mask, 2, 2, uniform=torch.rand(2, 2, 3, dtype=torch.float64))


def test_bad_options():
    for options, message in (
        ({"strategy": "nucleus"}, "choose one of sample, greedy"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.2}, "top_p is 1.2"),
    ):
        with pytest.raises(InputError, match=message):
            Sampling(**options)


def test_a_model_without_a_cache_is_refused():
    config = OpenAIGPTConfig(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32, pad_token_id=PAD)
    ids, mask = prompts(3)
    with pytest.raises(InputError, match="not all of its layers keep keys and values"):
        generate(OpenAIGPTLMHeadModel(config), ids, mask, 2, 3)


@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_diverged_weights_are_named(strategy):
    model = tiny_llm()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    ids, mask = prompts(3)
    with pytest.raises(InputError, match="lower the learning rate"):
        generate(model, ids, mask, 2, 3, sampling=Sampling(strategy))


def test_both_strategies_run_inside_inference_mode():
    model = tiny_llm()
    ids, mask = prompts(3, 9)
    with torch.inference_mode():
        for strategy in ("sample", "greedy"):
            made = generate(model, ids, mask, 2, 2, sampling=Sampling(strategy))
            assert made.mask.any(dim=-1).all()
