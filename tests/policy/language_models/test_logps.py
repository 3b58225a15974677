import copy
import itertools
from pathlib import Path

import pytest
import torch
from helpers.tiny_llm import KINDS, PlainModel, prompts, rows_of, tiny_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import plain_weights

from minirec_pl import InputError
from minirec_pl.policy.language_models.causal_lm import Head, body_of, computes_bfloat16, head_of, length_buckets
from minirec_pl.policy.language_models.generation import generate
from minirec_pl.policy.language_models.logps import completion_logps, head_logps
from minirec_pl.policy.language_models.model_support import support_of


def case(model, *lengths, group=3, length=9, vocabulary=40):
    """Prompts, sampled completions of unequal length, and a weight for each of their tokens."""
    ids, mask = prompts(*lengths, vocabulary=vocabulary)
    random = torch.Generator().manual_seed(5)
    made = generate(model, ids, mask, group, length, generator=random)
    cut = torch.randint(1, length + 1, made.ids.shape[:2], generator=random)
    made = made._replace(mask=made.mask & (torch.arange(made.ids.shape[2]) < cut[..., None]))
    return ids, mask, made, torch.randn(made.ids.shape, generator=random)


def plain_gradients(model, ids, mask, made, weight, temperature=1.0):
    """Gradients of the weighted sum of log-probabilities in float64, a full sequence at a time; checks values, too."""
    plain = PlainModel(model)
    values = torch.zeros(2, *made.ids.shape, dtype=torch.float64)
    for row, prompt in enumerate(rows_of(ids, mask)):
        for place, completion in enumerate(rows_of(made.ids[row], made.mask[row])):
            logps, entropy = plain.token_logps(prompt, completion, temperature)
            (logps * weight[row, place, : len(completion)].double()).sum().backward()
            values[:, row, place, : len(completion)] = torch.stack([logps.detach(), entropy.detach()])
    return values, {name: parameter.grad for name, parameter in plain.model.named_parameters()}


def assert_close_to_plain(gradients, truth, tolerance=1e-4):
    for name, expected in truth.items():
        if expected is None:
            assert gradients[name] is None
            continue
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            gradients[name].double(), expected, rtol=0, atol=tolerance * scale + 1e-7, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_full_unpadded_sequences(kind, temperature):
    model = tiny_llm(kind)
    ids, mask, made, weight = case(model, 3, 20, 8, 9)
    assert made.mask.sum(dim=-1).float().std() > 1
    found = completion_logps(model, ids, mask, made.ids, made.mask, temperature)
    (found.logps * weight).sum().backward()
    values, truth = plain_gradients(model, ids, mask, made, weight, temperature)
    torch.testing.assert_close(found.logps.detach().double(), values[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), values[1], rtol=0, atol=2e-5)
    assert not found.entropy.requires_grad
    assert_close_to_plain({name: parameter.grad for name, parameter in model.named_parameters()}, truth)


def test_log_probabilities_are_those_of_sampling():
    model = tiny_llm()
    ids, mask, made, _ = case(model, 4, 15)
    with torch.no_grad():
        found = completion_logps(model, ids, mask, made.ids, made.mask).logps
    torch.testing.assert_close(found, made.logps * made.mask, rtol=0, atol=1e-5)


def test_each_prompt_is_run_once():
    model, fed = tiny_llm(), []
    ids, mask, made, _ = case(model, 20, 19, group=5)
    support_of(model)
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: fed.append(int(given["attention_mask"][:, -given["input_ids"].shape[1] :].sum())),
        with_kwargs=True,
    )
    completion_logps(model, ids, mask, made.ids, made.mask)
    assert fed[0] == 39
    assert sum(fed[1:]) == int(made.mask[:, :, 1:].sum())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_neither_value_nor_gradient(kind, reentrant):
    model = tiny_llm(kind)
    ids, mask, made, weight = case(model, 3, 20, 8)
    expected = completion_logps(model, ids, mask, made.ids, made.mask).logps.detach()
    _, truth = plain_gradients(model, ids, mask, made, weight)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = [dict(vars(module)) for module in model.modules()]
    found = completion_logps(model.train(), ids, mask, made.ids, made.mask).logps
    assert [set(vars(module)) for module in model.modules()] == [set(names) for names in before]
    (found * weight).sum().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)
    assert_close_to_plain({name: parameter.grad for name, parameter in model.named_parameters()}, truth)


def test_checkpointing_shares_the_prompt_where_it_can():
    fed = {}
    for reentrant in (False, True):
        model, fed[reentrant] = tiny_llm(), []
        ids, mask, made, _ = case(model, 20, 20, group=4)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().base_model.register_forward_pre_hook(
            lambda module, args, given, seen=fed[reentrant]: seen.append(given["input_ids"].shape), with_kwargs=True
        )
        completion_logps(model, ids, mask, made.ids, made.mask)
    assert fed[False][0] == (2, 20)
    assert fed[True] == [(8, 20 + made.ids.shape[2] - 1)]


def test_a_model_with_dropout_is_exact_in_evaluation_mode_and_noisy_in_training():
    model = tiny_llm("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    ids, mask, made, weight = case(model, 3, 9)
    values, _ = plain_gradients(model, ids, mask, made, weight)
    found = completion_logps(model, ids, mask, made.ids, made.mask).logps
    torch.testing.assert_close(found.detach().double(), values[0], rtol=0, atol=2e-5)
    noisy = [completion_logps(model.train(), ids, mask, made.ids, made.mask).logps for _ in range(2)]
    assert not torch.equal(*noisy)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_are_those_of_full_sequences_and_the_base_has_none(checkpointing):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llm(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    ids, mask, made, weight = case(model, 3, 20)
    values, truth = plain_gradients(model, ids, mask, made, weight)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    (completion_logps(model, ids, mask, made.ids, made.mask).logps * weight).sum().backward()
    assert sum(grad is not None for grad in truth.values()) == 2 * 3 * 2
    assert_close_to_plain({name: parameter.grad for name, parameter in model.named_parameters()}, truth)
    merged = tiny_llm()
    merged.load_state_dict(dict(plain_weights(model)))
    expected = completion_logps(merged, ids, mask, made.ids, made.mask).logps
    torch.testing.assert_close(expected.detach().double(), values[0], rtol=0, atol=2e-5)


def test_a_head_trained_in_full_beside_lora_gets_its_gradient():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llm("qwen2"), config)
    ids, mask, made, weight = case(model, 3, 20)
    (completion_logps(model, ids, mask, made.ids, made.mask).logps * weight).sum().backward()
    _, truth = plain_gradients(model, ids, mask, made, weight)
    assert sum("lm_head" in name for name, grad in truth.items() if grad is not None) == 1
    assert_close_to_plain({name: parameter.grad for name, parameter in model.named_parameters()}, truth)


def test_lora_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llm("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match="leave lm_head out of target_modules"):
        head_of(model)


def test_bfloat16_is_close_to_float32():
    half = tiny_llm().to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    ids, mask, made, weight = case(full, 3, 20)
    for model in (half, full):
        (completion_logps(model, ids, mask, made.ids, made.mask).logps * weight).sum().backward()
    with torch.no_grad():
        values = [completion_logps(model, ids, mask, made.ids, made.mask).logps for model in (half, full)]
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(*values, rtol=0.05, atol=0.1)
    for ours, truth in zip(half.parameters(), full.parameters(), strict=True):
        assert ours.grad.dtype == torch.bfloat16
        scale = float(truth.grad.abs().max())
        torch.testing.assert_close(ours.grad.float(), truth.grad, rtol=0, atol=0.05 * scale)


def test_half_precision_is_widened_only_where_the_processor_lacks_it(monkeypatch):
    half, seen = tiny_llm().to(torch.bfloat16), []
    support_of(half)
    half.base_model.norm.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for supported in (True, False):
        monkeypatch.setattr(
            "minirec_pl.policy.language_models.causal_lm.computes_bfloat16", lambda answer=supported: answer
        )
        assert head_of(half).weight.dtype == (torch.bfloat16 if supported else torch.float32)
        body_of(half)(input_ids=torch.tensor([[7, 8]]))
    assert seen == [torch.bfloat16, torch.float32]
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's features are read from /proc/cpuinfo")
def test_emulated_bfloat16_does_not_count():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert computes_bfloat16() == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_the_head_is_that_of_finite_differences(bias, softcap):
    random = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(size, dtype=torch.float64, generator=random).requires_grad_()

    states, weight, shift = leaf(5, 3), leaf(7, 3), leaf(7) if bias else None
    targets = torch.tensor([0, 6, 3, 3, 1])
    inputs = [value for value in (states, weight, shift) if value is not None]

    def logps(*values):
        return head_logps(Head(values[1], values[2] if bias else None, softcap), values[0], targets, 0.7, (2, 3))[0]

    assert torch.autograd.gradcheck(logps, inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tiles_do_not_change_the_result(data):
    n, width, vocabulary = (data.draw(st.integers(1, high)) for high in (9, 4, 23))
    tile = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 25))
    temperature, softcap = data.draw(st.sampled_from([0.5, 1.0, 3.0])), data.draw(st.sampled_from([None, 2.0]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    states, weight = (
        (3 * torch.randn(rows, width, generator=random, dtype=torch.float64)).requires_grad_()
        for rows in (n, vocabulary)
    )
    targets = torch.randint(vocabulary, (n,), generator=random)
    upstream = torch.randn(n, generator=random, dtype=torch.float64) * (torch.rand(n, generator=random) > 0.3)
    found, entropy = head_logps(Head(weight, None, softcap), states, targets, temperature, tile)
    logits = states @ weight.T
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    logps = logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, logps.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(dim=-1).detach())
    ours = torch.autograd.grad((found * upstream).sum(), [states, weight])
    truth = torch.autograd.grad((logps.gather(1, targets[:, None]).squeeze(1) * upstream).sum(), [states, weight])
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_of_all_tokens_never_exist_at_once():
    """The largest tensor that the head makes is its weight's gradient, in forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in [result] if isinstance(result, torch.Tensor) else []:
                self.numel = max(self.numel, tensor.numel())
            return result

    states, weight = torch.randn(600, 4).requires_grad_(), torch.randn(3000, 4).requires_grad_()
    with Largest() as largest:
        logps, _ = head_logps(Head(weight, None, None), states, torch.randint(3000, (600,)), 1.0, (100, 50))
        logps.sum().backward()
    assert largest.numel == weight.numel() < 600 * 3000


def test_masked_tokens_get_nothing():
    model = tiny_llm()
    ids, mask, made, _ = case(model, 3, 9)
    nothing = torch.zeros_like(made.mask)
    found = completion_logps(model, ids, mask, made.ids, nothing)
    found.logps.sum().backward()
    assert not found.logps.any()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    first = nothing.clone()
    first[:, :, 0] = True
    expected = completion_logps(model, ids, mask, made.ids, made.mask).logps[:, :, 0]
    torch.testing.assert_close(completion_logps(model, ids, mask, made.ids, first).logps[:, :, 0], expected)


def test_an_empty_prompt_is_named():
    model = tiny_llm()
    ids, mask, made, _ = case(model, 3, 9)
    with pytest.raises(InputError, match="prompt 1 of the batch is empty"):
        completion_logps(model, ids, mask * torch.tensor([[1], [0]]), made.ids, made.mask)


def test_prompts_padded_on_the_right_are_refused():
    model = tiny_llm()
    ids, mask, made, _ = case(model, 9, 3)
    with pytest.raises(InputError, match="prompt 1 of the batch is empty or padded on the right: pad prompts on the"):
        completion_logps(model, ids.flip(1), mask.flip(1), made.ids, made.mask)


def test_a_group_of_one_and_completions_without_a_token():
    model = tiny_llm()
    ids, mask, made, weight = case(model, 3, 20, 8, group=1)
    made = made._replace(mask=made.mask & torch.tensor([True, False, True])[:, None, None])
    (completion_logps(model, ids, mask, made.ids, made.mask).logps * weight).sum().backward()
    some = [0, 2]
    kept = type(made)(*(part[some] for part in made))
    values, truth = plain_gradients(model, ids[some], mask[some], kept, weight[some])
    found = completion_logps(model, ids, mask, made.ids, made.mask)
    torch.testing.assert_close(found.logps[some].detach().double(), values[0], rtol=0, atol=2e-5)
    assert not found.logps[1].any()
    assert not found.entropy[1].any()
    assert_close_to_plain({name: parameter.grad for name, parameter in model.named_parameters()}, truth)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_buckets_hold_each_row_once_with_little_padding(lengths):
    buckets = length_buckets(torch.tensor(lengths))
    assert sorted(torch.cat(buckets).tolist()) == list(range(len(lengths)))
    for rows in buckets:
        held = [lengths[row] for row in rows]
        assert held == sorted(held)
        assert sum(held) >= 0.8 * max(held) * len(held)
    assert all(lengths[a[-1]] <= lengths[b[0]] for a, b in itertools.pairwise(buckets))


@pytest.mark.parametrize("rows", [1, 96, 97])
def test_a_long_head_gives_the_same_logits_for_few_rows_and_many(rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(2**14, 8, generator=random), torch.randn(2**14, generator=random)
    states = torch.randn(rows, 2, 8, generator=random, requires_grad=True)
    for head in (Head(weight, None, None), Head(weight, bias, None)):
        expected = states.double() @ weight.double().T + (0 if head.bias is None else bias.double())
        logits = head.logits(states)
        assert torch.allclose(logits.double(), expected, atol=1e-4)
        (slope,) = torch.autograd.grad(logits[..., :3].sum(), states)
        assert torch.allclose(slope, weight[:3].sum(dim=0).expand_as(slope), atol=1e-4)
