"""Heads, positions, padding and caches of models: as the model has them, or refused; truth is one plain sequence."""

import copy

import pytest
import torch
from helpers.chat_models import CATALOGUE, chat_folder
from helpers.tiny_llm import EOS, PAD, SIZES, PlainModel, longrope, prompts, rows_of
from transformers import AutoConfig, AutoModelForCausalLM

from minirec_pl import InputError
from minirec_pl.policy import GenerativePolicy, LanguageModel, PromptTemplate, completion_logps, generate
from minirec_pl.policy.item_index import ItemIndex
from minirec_pl.policy.language_models.causal_lm import body_of, head_of
from minirec_pl.policy.language_models.model_support import few_layers, support_of
from minirec_pl.policy.prompt import EncodedPrompts
from minirec_pl.policy.supervised import stretches

LONGROPE = longrope(16)


def model_of(kind, **options):
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": list(EOS)}
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **tokens, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def plain_logps(model, prompt, completion):
    return PlainModel(model).token_logps(prompt, completion)[0].detach()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("cohere2", {"logit_scale": 4.0}),
        ("hyperclovax", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
    ],
)
def test_logits_are_those_of_the_model_at_any_size_of_its_states(kind, options):
    model = model_of(kind, **options).double()
    ids = torch.tensor([[7, 8, 9]])
    found = head_of(model).logits(body_of(model)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    found = head_of(model).logits(body_of(model)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)


def test_gradients_go_through_scale_and_softcap():
    for kind, options in (("granite", {"logits_scaling": 0.25}), ("nanochat", {"final_logit_softcapping": 2.0})):
        model = model_of(kind, **options).double()
        ids, mask = prompts(5, 3)
        completions = torch.tensor([[[7, 8, 9]], [[10, 11, 12]]])
        made = completion_logps(model, ids, mask, completions, torch.ones_like(completions).bool(), 0.7)
        made.logps.sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        plain = PlainModel(model)
        sum(
            plain.token_logps(row, completion[0].tolist(), 0.7)[0].sum()
            for row, completion in zip(rows_of(ids, mask), completions, strict=True)
        ).backward()
        for name, parameter in plain.model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_a_head_that_is_not_known_is_refused_everywhere():
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output + output.square())
    ids, mask = prompts(4, 2)
    for call in (
        lambda: generate(model, ids, mask, 2, 3),
        lambda: completion_logps(model, ids, mask, ids[:, None], mask[:, None]),
    ):
        with pytest.raises(InputError, match="changes the states or the logits around its head") as info:
            call()
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("where", ["before the head", "at the end of the body"])
def test_a_norm_between_body_and_head_is_refused(where):
    model = model_of("llama")
    norm = torch.nn.LayerNorm(16)
    if where == "before the head":
        model.lm_head.register_forward_pre_hook(lambda module, args: (norm(args[0]),))
        with pytest.raises(InputError, match="around its head"):
            support_of(model)
    else:
        model.base_model.norm.register_forward_hook(lambda module, args, output: norm(output))
        assert support_of(model) == (None, None)


def test_models_that_ignore_padding_are_refused():
    model = model_of("rwkv", attention_hidden_size=16)
    ids, mask = prompts(4, 2)
    with pytest.raises(InputError, match="RwkvForCausalLM cannot be a policy \\(a batch padded on the left"):
        completion_logps(model, ids, mask, ids[:, None], mask[:, None])


def test_recurrent_models_have_log_probabilities_but_no_shared_prompts():
    model = model_of("lfm2", layer_types=["conv", "full_attention"]).double()
    ids, mask = prompts(5, 3)
    with pytest.raises(InputError, match="recurrent layers"):
        generate(model, ids, mask, 2, 3)
    completions = torch.tensor([[[7, 8, 9], [6, 7, 0]], [[10, 0, 0], [11, 12, 13]]])
    lengths = [[3, 2], [1, 3]]
    counted = torch.tensor([[[place < n for place in range(3)] for n in row] for row in lengths])
    found = completion_logps(model, ids, mask, completions, counted).logps
    for sample, row in enumerate(rows_of(ids, mask)):
        for g, n in enumerate(lengths[sample]):
            truth = plain_logps(model, row, completions[sample, g, :n].tolist())
            torch.testing.assert_close(found[sample, g, :n], truth, rtol=0, atol=1e-9)


def test_a_model_is_tried_once_and_left_as_it_was():
    model = model_of("gpt2", n_embd=16, n_layer=1, n_head=2).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    runs = []
    model.base_model.register_forward_pre_hook(lambda module, args: runs.append(1))
    before, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    support_of(model)
    tried = len(runs)
    assert tried > 0
    support_of(model), head_of(model)
    assert len(runs) == tried
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_longrope_rows_do_not_depend_on_the_rows_beside_them():
    model = model_of("phi3", **LONGROPE).double()
    ids, mask = prompts(20, 4, 30, 11)
    made = generate(model, ids, mask, 2, 5, generator=torch.Generator().manual_seed(0))
    found = completion_logps(model, ids, mask, made.ids, made.mask).logps
    for sample, row in enumerate(rows_of(ids, mask)):
        for g in range(2):
            own = made.ids[sample, g][made.mask[sample, g]].tolist()
            truth = plain_logps(model, row, own)
            torch.testing.assert_close(made.logps[sample, g, : len(own)], truth, rtol=0, atol=1e-9)
            torch.testing.assert_close(found[sample, g, : len(own)], truth, rtol=0, atol=1e-9)
    assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize(("prompt", "new", "refused"), [(11, 5, False), (12, 5, True), (16, 1, True), (17, 9, False)])
def test_a_completion_does_not_cross_the_switch(prompt, new, refused):
    model = model_of("phi3", **LONGROPE)
    ids, mask = prompts(2, prompt)
    completions = torch.full((2, 1, new), 7)
    calls = (
        lambda: generate(model, ids, mask, 1, new),
        lambda: completion_logps(model, ids, mask, completions, torch.ones_like(completions).bool()),
    )
    for call in calls:
        if refused:
            with pytest.raises(InputError, match=f"has {prompt} tokens, {prompt + new} with the longest completion"):
                call()
        else:
            call()


def test_items_and_stretches_on_both_sides_of_the_switch():
    model = model_of("phi3", **LONGROPE).double()
    random = torch.Generator().manual_seed(3)
    rows = [torch.randint(6, 40, (n,), generator=random).tolist() for n in (20, 15, 16, 17, 3)]
    index = ItemIndex(rows, 16, torch.float64, PAD)
    found = index.encode(model, torch.arange(5))
    for vector, row in zip(found, rows, strict=True):
        state = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, torch.nn.functional.normalize(state, dim=0), rtol=0, atol=1e-9)
    long = list(range(6, 26))
    ids = torch.tensor([[PAD] * 10 + long[:10], long, [PAD] * 3 + long[:17]])
    made = stretches(EncodedPrompts(ids, (ids != PAD).long(), torch.arange(3)), 16)
    assert made.mask.sum(dim=1).tolist() == [10, 20]
    assert made.row.tolist() == [0, 1, 1]


def test_sequences_over_the_switch_are_refused_in_training():
    config = {**SIZES, "model_type": "phi3", "num_key_value_heads": 2, "max_position_embeddings": 128, **LONGROPE}
    policy = GenerativePolicy(config=config)
    policy.bind(CATALOGUE)
    pairs = {"row": torch.tensor([0]), "position": torch.tensor([3]), "target": torch.tensor([2])}
    for width, fits in ((15, True), (16, False)):
        batch = {"sequence": torch.zeros(1, width, dtype=torch.int64), **pairs}
        if fits:
            assert policy.sequence_nll(batch).isfinite()
        else:
            with pytest.raises(InputError, match="training sequences have up to 17 tokens"):
                policy.sequence_nll(batch)


def test_dynamic_positions_and_places_in_the_batch_have_a_limit():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = model_of("llama", rope_parameters=rope, max_position_embeddings=20)
    ids, mask = prompts(10, 18)
    completions = torch.full((2, 1, 5), 7)
    with pytest.raises(InputError, match="beyond 20 what the model says of a row depends on the rest of the batch"):
        completion_logps(model, ids, mask, completions, torch.ones_like(completions).bool())
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 24, "floor_scale": 32, "attn_scale": 0.5}
    model = model_of("llama4_text", **experts, no_rope_layers=[1, 0])
    ids, mask = prompts(30, 6)
    with pytest.raises(InputError, match="beyond 31"):
        completion_logps(model, ids, mask, completions, torch.ones_like(completions).bool())


@pytest.mark.parametrize("item_ids", ["title", "token"])
def test_prompts_over_the_switch_name_their_sample(tmp_path, item_ids):
    folder = chat_folder(tmp_path / "base", "phi3", **longrope(40), num_key_value_heads=2)
    prompt = PromptTemplate(system="", user="{history}", item="{title}", age="")
    policy = GenerativePolicy(language_model=LanguageModel(str(folder), "float32"), item_ids=item_ids, prompt=prompt)
    policy.bind(CATALOGUE)
    history = torch.full((2, 12), -1)
    history[0, :1], history[1] = 0, 6
    batch = {"history": history, "seen": history, "target": torch.tensor([1, 1]), "sample_id": torch.tensor([70, 71])}
    lengths = policy.chat.prompt.encode(policy.chat.tokenizer, batch, CATALOGUE).mask.sum(dim=1).tolist()
    assert lengths[0] < 40 < lengths[1]
    policy.encode(batch)
    policy.bind(CATALOGUE)
    for n in range(2, 12):
        part = {**batch, "history": torch.where(torch.arange(12) < n, history[1:], -1)[[0, 0]]}
        length = int(policy.chat.prompt.encode(policy.chat.tokenizer, part, CATALOGUE).mask.sum(dim=1)[0])
        if length <= 40 < length + policy.id_length:
            with pytest.raises(InputError, match=f"the prompt of sample 70 has {length} tokens"):
                policy.encode(part)
        else:
            policy.encode(part)


def test_an_untrained_model_is_tried_with_larger_weights():
    """Near zero, layers that ignore the mask of padding change nothing that would be seen."""
    own = {"block_types": ["recurrent", "attention"], "lru_width": 16, "attention_window_size": 8}
    sizes = {name: value for name, value in SIZES.items() if name not in own}
    policy = GenerativePolicy(config={"model_type": "recurrent_gemma", **sizes, **own})
    with pytest.raises(InputError, match="a batch padded on the left gives other numbers"):
        policy.bind(CATALOGUE)
    config = AutoConfig.for_model("recurrent_gemma", **sizes, **own, vocab_size=40)
    assert "padded on the left" in support_of(few_layers(config)).padding
    bound = GenerativePolicy(config={**SIZES, "num_key_value_heads": 2})
    bound.bind(CATALOGUE)
    assert support_of(bound.model) == (None, None)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma2", "granite"])
def test_a_warm_start_on_sequences_is_what_the_model_says_of_tokens(kind):
    """Models may look a token up in several embeddings, so that the usual one alone is not what they are given."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    twice = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
    twice |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, **layers}
    heads = {"head_dim": 4} if kind.startswith("gemma") else {}
    config = {**SIZES, "model_type": kind, "num_key_value_heads": 2, **heads}
    config |= twice if kind == "gemma3n_text" else {}
    torch.manual_seed(0)
    policy = GenerativePolicy(config=config)
    policy.bind(CATALOGUE)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    policy.double()
    sequence = torch.tensor([[1, 2, 0, 3], [3, 1, -1, -1]])
    row, position, target = torch.tensor([[0, 0, 2], [0, 2, 3], [1, 0, 1]]).T
    loss = policy.sequence_nll({"sequence": sequence, "row": row, "position": position, "target": target})
    wanted = []
    for r, p, t in zip(row.tolist(), position.tolist(), target.tolist(), strict=True):
        ids = torch.tensor([[policy.bos_token_id, *(sequence[r, : p + 1] + 3).tolist()]])
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, -1, 3:]
        wanted.append(-logits.log_softmax(-1)[t])
    assert loss.item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-9)
