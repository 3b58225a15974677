import copy
import json

import pytest
import torch
from helpers.chat_models import LORA, PROMPT, chat_folder, chat_tokenizer, shaken_adapters
from helpers.family_models import family_folder, family_model
from helpers.plain_policy import shaken
from helpers.slow import slow
from helpers.tiny_llm import prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirec_pl import InputError
from minirec_pl.cli.export import export
from minirec_pl.data.samples import Catalogue
from minirec_pl.grpo.reference import adapters_off
from minirec_pl.policy import GenerativePolicy, Sampling, completion_logps, generate
from minirec_pl.policy.language_models.adapters import PROJECTIONS, Lora
from minirec_pl.policy.language_models.causal_lm import body_of, computes_bfloat16, head_of, same_in_training
from minirec_pl.policy.language_models.generation import VocabularyHead, eos_token_ids
from minirec_pl.policy.language_models.model_config import text_config
from minirec_pl.policy.language_models.pretrained import LanguageModel, grow, save_language_model
from minirec_pl.utils.checkpoints import weights_digest, weights_under_adapters

KINDS = ["llama", "qwen2", "gemma2"]
IDS, MASK = prompts(5, 9, vocabulary=300)


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()].float()


def add_tokens(model, tokenizer):
    tokenizer.add_tokens(["<a_0>", "<a_1>"])
    grow(model, tokenizer)
    return tokenizer.convert_tokens_to_ids(["<a_0>", "<a_1>"])


def loaded(folder, dtype="float32", lora=LORA, extend=None, **options):
    return LanguageModel(str(folder), dtype, lora, **options).load(extend)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_are_all_that_learns(tmp_path, kind):
    folder = chat_folder(tmp_path / "base", kind)
    plain, _ = loaded(folder, lora=None)
    model, tokenizer = loaded(folder)
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=1e-5)
    assert tokenizer.eos_token_id == 2
    assert all(parameter.requires_grad for parameter in plain.parameters())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[-4] for name in trained if "lora" in name} == set(PROJECTIONS)
    assert all("lora_" in name for name in trained)
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {LORA.alpha / LORA.r}


@pytest.mark.parametrize("new_tokens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_give_equal_logits(tmp_path, kind, new_tokens):
    folder = chat_folder(tmp_path / "base", kind)
    model, tokenizer = loaded(folder, extend=add_tokens if new_tokens else None)
    shaken_adapters(model)
    truth = logits_of(model)
    save_language_model(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 120_000
    again, tokenizer_again = loaded(tmp_path / "adapter", lora=None)
    assert torch.equal(logits_of(again), truth)
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_again.chat_template == tokenizer.chat_template
    for one, other in ((model, again), (again, model)):
        names = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
        assert names == {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    save_language_model(model, tokenizer, tmp_path / "merged", merge=True)
    assert torch.equal(logits_of(model), truth)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), truth, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_new_tokens_learn_at_both_ends(tmp_path, kind):
    folder = chat_folder(tmp_path / "base", kind)
    model, tokenizer = loaded(folder, extend=add_tokens)
    new = tokenizer.convert_tokens_to_ids(["<a_0>", "<a_1>"])
    full, _ = loaded(folder, lora=None, extend=add_tokens)
    full.load_state_dict({n.replace("base_layer.", ""): p for n, p in _plain_names(model).items()}, strict=False)
    completions, weight = torch.tensor([[[new[0], 40, new[1]]], [[41, new[1], 2]]]), torch.tensor([[1.0, 2.0, -1.0]])
    for each in (model, full):
        each.eval()
        logps = completion_logps(each, IDS, MASK, completions, torch.ones_like(completions, dtype=torch.bool)).logps
        (logps * weight).sum().backward()
    ends = [full.get_input_embeddings().weight.grad]
    if not full.config.tie_word_embeddings:
        ends.append(full.get_output_embeddings().weight.grad)
    rows = [p.grad for n, p in model.named_parameters() if "trainable_tokens" in n]
    assert len(rows) == len(ends)
    for ours, truth in zip(rows, ends, strict=True):
        torch.testing.assert_close(ours, truth[new], rtol=1e-3, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "trainable_tokens" in name), name


def _plain_names(model):
    state = model.get_base_model().state_dict()
    return {name.replace("token_adapter.", ""): value for name, value in state.items() if "lora" not in name}


def test_the_head_sees_the_trained_rows(tmp_path):
    model, tokenizer = loaded(chat_folder(tmp_path / "base"), extend=add_tokens)
    new = tokenizer.convert_tokens_to_ids(["<a_0>", "<a_1>"])
    rows = next(p for n, p in model.named_parameters() if "trainable_tokens" in n)
    with torch.no_grad():
        rows.add_(1.0)
    assert torch.equal(head_of(model).weight[new], rows)


def test_a_whole_model_goes_there_and_back(tmp_path):
    model, tokenizer = loaded(chat_folder(tmp_path / "base"), lora=None, extend=add_tokens)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    save_language_model(model, tokenizer, tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    again, _ = loaded(tmp_path / "whole", lora=None)
    assert torch.equal(logits_of(again), logits_of(model))


def test_half_precision(tmp_path):
    folder = chat_folder(tmp_path / "base")
    exact, half = (logits_of(loaded(folder, dtype)[0]) for dtype in ("float32", "bfloat16"))
    model, _ = loaded(folder, "bfloat16", extend=add_tokens)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_with_sampling_in_between_leaves_gradients_equal(tmp_path, kind, dtype):
    folder = chat_folder(tmp_path / "base", kind)
    random = torch.Generator().manual_seed(0)
    completions, weight = torch.randint(6, 300, (2, 3, 4), generator=random), torch.randn(2, 3, 4, generator=random)
    gradients, drawn = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = loaded(folder, dtype, gradient_checkpointing=checkpointing)
        shaken_adapters(model)
        mask = torch.ones_like(completions, dtype=torch.bool)
        logps = completion_logps(model, IDS, MASK, completions, mask).logps
        numbers = torch.Generator().manual_seed(1)
        drawn.append(generate(model, IDS, MASK, 3, 4, sampling=Sampling(), generator=numbers).ids)
        assert model.training
        (logps * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    scale = gradients[0].abs().max()
    if dtype == "float32":
        torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, rtol=1e-4, atol=1e-4)
    else:  # layers that recompute do so in half precision, the others may be widened
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    assert torch.equal(*drawn)


def test_the_weights_under_adapters_are_the_same_whenever_they_are_loaded(tmp_path):
    model, tokenizer = loaded(chat_folder(tmp_path / "base"), extend=add_tokens)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fixed = weights_under_adapters(model)
    assert fixed.keys() == {name for name, parameter in parameters.items() if not parameter.requires_grad}
    assert any("lora_B" in name for name in parameters.keys() - fixed.keys())
    model.requires_grad_(False)
    assert weights_under_adapters(model).keys() == fixed.keys()
    save_language_model(model, tokenizer, tmp_path / "adapter")
    digests = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        digests.add(weights_digest(weights_under_adapters(loaded(tmp_path / "adapter", lora=None)[0])))
    assert len(digests) == 1


def test_under_autocast_adapters_stay_apart(tmp_path):
    model, _ = loaded(chat_folder(tmp_path / "base"))
    shaken_adapters(model).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = states_of(model).detach()
        with torch.no_grad():
            assert torch.equal(states_of(model), apart)


def states_of(model):
    states = body_of(model)(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    return states[MASK.bool()].double()


@pytest.mark.parametrize("new_tokens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_without_gradient_add_the_adapters_to_the_weights(tmp_path, kind, dtype, new_tokens):
    model, _ = loaded(chat_folder(tmp_path / "base", kind), dtype, extend=add_tokens if new_tokens else None)
    shaken_adapters(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        merged = states_of(model)
    apart = states_of(model)
    scale = apart.abs().max().item()
    exact = copy.deepcopy(model).double().get_base_model().model
    rows = [row[real.bool()][None] for row, real in zip(IDS, MASK, strict=True)]
    truth = torch.cat([exact(input_ids=row).last_hidden_state[0] for row in rows]).detach()
    close = 1e-5 if dtype == "float32" or not computes_bfloat16() else 0.05
    torch.testing.assert_close(merged, apart.detach(), rtol=0, atol=close * scale)
    rounding = (apart.detach() - truth).abs().max().item()
    torch.testing.assert_close(merged, truth, rtol=0, atol=max(close * scale, 2 * rounding))
    apart.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merged_weights_follow_the_adapters(tmp_path):
    model, _ = loaded(chat_folder(tmp_path / "base"))
    shaken_adapters(model).eval()
    with torch.no_grad():
        first = states_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    states_of(model).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        merged, apart = states_of(model), model.get_base_model().model(input_ids=IDS, attention_mask=MASK)
        without = logits_of(model)
        with adapters_off(model):
            off, plain = states_of(model), model.get_base_model().model(input_ids=IDS, attention_mask=MASK)
    assert float((merged - first).abs().max()) > 1e-2
    for ours, truth in ((merged, apart), (off, plain)):
        torch.testing.assert_close(ours, truth.last_hidden_state[MASK.bool()].double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model), without)


def test_dropout_keeps_adapters_apart_where_it_is_at_work(tmp_path):
    model, _ = loaded(chat_folder(tmp_path / "base"), lora=Lora(r=4, alpha=16, dropout=0.5))
    shaken_adapters(model)
    assert not same_in_training(model)
    with torch.no_grad():
        assert not torch.equal(states_of(model), states_of(model))
        model.eval()
        assert torch.equal(states_of(model), states_of(model))
    assert same_in_training(loaded(tmp_path / "base")[0])


def test_a_model_that_is_not_to_be_had(tmp_path):
    with pytest.raises(InputError, match=r"'someone/some-model' is neither .* give models/some-model as the name"):
        LanguageModel("someone/some-model").load()


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_cannot_be_used(tmp_path):
    def broken(name, what):
        folder = chat_folder(tmp_path / name)
        what(folder)
        return folder

    cases = (
        ("no-model", lambda f: (f / "model.safetensors").unlink(), "the model in '.*no-model' cannot be read"),
        ("cut", lambda f: (f / "model.safetensors").write_bytes(b"{}"), "the model in '.*cut' cannot be read"),
        ("config", lambda f: (f / "config.json").write_text("{"), "config' cannot be read"),
        ("deeper", lambda f: edit(f / "config.json", num_hidden_layers=3), r"lacks weights \(model.layers.2"),
        ("no-end", lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no-end' has no end-of-sequence token"),
        ("code", lambda f: edit(f / "config.json", auto_map={"AutoModelForCausalLM": "x.Y"}, model_type="x"), "code"),
        ("small", lambda f: chat_folder(f, vocabulary=300), "has token 329 and the model a vocabulary of 300"),
    )
    for name, what, message in cases:
        with pytest.raises(InputError, match=message) as info:
            loaded(broken(name, what))
        assert "\n" not in str(info.value)


def test_options_that_peft_refuses(tmp_path):
    folder = chat_folder(tmp_path / "base")
    for lora, message in (
        (Lora(target_modules=["self_attn"]), r"refused by peft .*fix --model\.policy\.language_model\.lora"),
        (Lora(r=0), "refused by peft"),
        (Lora(target_modules=["attention"]), r"\(attention\) names no linear layer of LlamaForCausalLM: give some of"),
        (Lora(target_modules=[]), "names no linear layer"),
    ):
        with pytest.raises(InputError, match=message):
            loaded(folder, lora=lora)


def test_adapters_that_cannot_be_used(tmp_path):
    model, tokenizer = loaded(chat_folder(tmp_path / "base"))
    save_language_model(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(InputError, match="has adapters already: leave out lora"):
        loaded(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    good = config.read_text()
    edit(config, base_model_name_or_path=str(chat_folder(tmp_path / "wide", hidden_size=32)))
    with pytest.raises(InputError, match=r"the adapter in '.*adapter' does not fit its model"):
        loaded(tmp_path / "adapter", lora=None)
    edit(config, base_model_name_or_path=str(chat_folder(tmp_path / "small", vocabulary=300)))
    message = r"'.*adapter' has token 329 and the model of '.*small' a vocabulary of 300: use the model the adapter was"
    with pytest.raises(InputError, match=message):
        loaded(tmp_path / "adapter", lora=None)
    edit(config, base_model_name_or_path="someone/gone")
    with pytest.raises(InputError, match="the model 'someone/gone' is neither"):
        loaded(tmp_path / "adapter", lora=None)
    edit(config, base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no model"):
        loaded(tmp_path / "adapter", lora=None)
    config.write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json' cannot be read"):
        loaded(tmp_path / "adapter", lora=None)
    config.write_text(good)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="does not fit its model"):
        loaded(tmp_path / "adapter", lora=None)


def test_adapters_with_rows_of_new_tokens_refuse_a_model_of_another_vocabulary(tmp_path):
    model, tokenizer = loaded(chat_folder(tmp_path / "base"), extend=add_tokens)
    save_language_model(model, tokenizer, tmp_path / "adapter")
    assert loaded(tmp_path / "adapter", lora=None)[0].config.vocab_size == 332
    edit(
        tmp_path / "adapter" / "adapter_config.json",
        base_model_name_or_path=str(chat_folder(tmp_path / "small", vocabulary=300)),
    )
    with pytest.raises(InputError, match=r"has token 329 and the model of '.*small' a vocabulary of 300"):
        loaded(tmp_path / "adapter", lora=None)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    folder = chat_folder(tmp_path / "base")
    chat_tokenizer(pad_token=None).save_pretrained(folder)
    edit(folder / "config.json", pad_token_id=None, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    model, tokenizer = loaded(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.eos_token_id == 2


def with_one_more(folder, **options):
    """The folder's tokenizer with an added token that its model has no row for."""
    tokenizer = chat_tokenizer(**options)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_added_token_without_a_row_leaves_the_model_as_it_is(tmp_path, kind):
    folder = chat_folder(tmp_path / "base", kind)
    before = logits_of(loaded(folder)[0])
    model, tokenizer = loaded(with_one_more(folder))
    assert len(tokenizer) == 331
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 330
    assert torch.equal(logits_of(model), before)
    save_language_model(model, tokenizer, tmp_path / "adapter")
    again, tokenizer = loaded(tmp_path / "adapter", lora=None)
    assert torch.equal(logits_of(again), before)
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == 330


@pytest.mark.parametrize("rows", [330, slow(340)])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_new_tokens_get_rows_above_the_tokenizers_highest(tmp_path, kind, more, rows):
    """With a token without a row in between, and in rows that pad the vocabulary; heads tied and untied."""
    folder = chat_folder(tmp_path / "base", kind, vocabulary=rows)
    if more:
        with_one_more(folder)
    catalogue = Catalogue(["a", "b", "c"], ["Toy Story", "Babe", "Seven"])
    options = {"item_ids": "token", "prompt": PROMPT}
    policy = GenerativePolicy(language_model=LanguageModel(str(folder), "float32", LORA), **options)
    policy.bind(catalogue)
    first = 331 if more else 330
    new = [first, first + 1, first + 2]
    assert policy.trie.item_tokens.tolist() == [[token] for token in new]
    size = max(rows, first + 3)
    ends = [policy.model.get_input_embeddings().weight, head_of(policy.model).weight]
    assert [len(end) for end in ends] == [size, size]
    tied = kind == "llama"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for end, own in zip(ends, (plain.get_input_embeddings(), plain.get_output_embeddings()), strict=True):
        assert torch.equal(end[:330], own.weight[:330])
        words = policy.chat.tokenizer(["Toy Story", "Babe", "Seven"], add_special_tokens=False)["input_ids"]
        means = torch.stack([own.weight[torch.tensor(row)].mean(dim=0) for row in words])
        torch.testing.assert_close(torch.nn.functional.cosine_similarity(end[new], means), torch.ones(3))
    assert len([name for name, _ in policy.named_parameters() if "trainable_tokens" in name]) == (1 if tied else 2)
    shaken_adapters(policy.model)
    truth = logits_of(policy.model)
    policy.save_pretrained(tmp_path / "policy")
    again = GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert torch.equal(logits_of(again.model), truth)
    assert again.trie.item_tokens.tolist() == policy.trie.item_tokens.tolist()
    export(tmp_path / "policy", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.get_output_embeddings().weight[new], head_of(policy.model).weight[new])
    whole = GenerativePolicy(language_model=LanguageModel(str(tmp_path / "merged"), "float32"), prompt=PROMPT)
    whole.bind(catalogue)
    torch.testing.assert_close(logits_of(whole.model), truth, rtol=1e-4, atol=1e-4)
    full = GenerativePolicy(language_model=LanguageModel(str(folder), "float32"), **options)
    full.bind(catalogue)
    shaken(full.model)
    full.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(GenerativePolicy(pretrained=str(tmp_path / "full")).model), logits_of(full.model))


def test_rows_of_new_tokens_in_a_model_of_several_modalities(tmp_path):
    folder = with_one_more(family_folder(tmp_path / "base", "gemma3"))
    model, tokenizer = loaded(folder, lora=Lora(dropout=0.0), extend=add_tokens)
    shaken_adapters(model)
    assert text_config(model).vocab_size == len(head_of(model).weight) == 333
    save_language_model(model, tokenizer, tmp_path / "adapter")
    again, _ = loaded(tmp_path / "adapter", lora=None)
    assert torch.equal(logits_of(again), logits_of(model))
    save_language_model(model, tokenizer, tmp_path / "merged", merge=True)
    merged, _ = loaded(tmp_path / "merged", lora=None)
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)


def test_a_padding_token_without_a_row_gives_way_to_the_end(tmp_path):
    model, tokenizer = loaded(with_one_more(chat_folder(tmp_path), pad_token="<image_soft_token>"))
    assert tokenizer.pad_token_id == 2
    assert model.config.pad_token_id == 0


def test_an_end_without_a_row_is_refused(tmp_path):
    with_one_more(chat_folder(tmp_path), eos_token="<image_soft_token>")
    with pytest.raises(InputError, match=r"ends a text with <image_soft_token> \(token 330\) and the model has 330"):
        loaded(tmp_path)


def test_new_tokens_never_take_the_ids_of_others(tmp_path):
    folder = chat_folder(tmp_path, vocabulary=340)
    stored = json.loads((folder / "tokenizer.json").read_text())
    last = max(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    stored["model"]["vocab"][last] = 331  # 329 and 330 stand for nothing
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"ids of the tokenizer .* have gaps"):
        loaded(folder, extend=lambda model, tokenizer: add_three(tokenizer))


def add_three(tokenizer):
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    return tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>"])


def write_only(monkeypatch, *tokens):
    """Leaves generation no choice."""
    steps = iter(tokens)

    def logps(self, states):
        only = torch.full((len(states), len(self.head.weight)), -torch.inf)
        only[:, next(steps)] = 0.0
        return only

    monkeypatch.setattr(VocabularyHead, "logps", logps)


@pytest.mark.parametrize("ends", [5, [5, 7], None])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_either_end_of_a_text_ends_it(tmp_path, monkeypatch, kind, ends):
    """The tokenizer's is <|im_end|>, token 2, and the model's config names others, or none."""
    folder = family_folder(tmp_path / "base", kind, eos_token_id=ends)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if kind == "gemma3" and ends is not None:
        nested = json.loads((folder / "config.json").read_text())
        assert nested["text_config"]["eos_token_id"] == ends
    its = [] if ends is None else [ends] if isinstance(ends, int) else ends
    model, tokenizer = loaded(folder, lora=Lora(dropout=0.0))
    for end in (2, *its):
        write_only(monkeypatch, 40, 41, end, 42, 43)
        made = generate(model, IDS, MASK, 1, 5)
        assert made.mask.sum(dim=-1).tolist() == [[3]] * len(IDS)
        assert made.ids[:, 0].tolist() == [[40, 41, end]] * len(IDS)
    save_language_model(model, tokenizer, tmp_path / "merged", merge=True)
    stored = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert {stored} if isinstance(stored, int) else set(stored) == {2, *its}
    again, _ = loaded(tmp_path / "merged", lora=None)
    assert set(eos_token_ids(again)) == {2, *its}


def test_the_ends_of_the_generation_config_go_before_those_of_the_config(tmp_path):
    folder = chat_folder(tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[9, 2])
    assert eos_token_ids(loaded(folder)[0]) == [9, 2]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_on_the_meta_device_is_the_one_that_is_loaded(tmp_path, kind, dtype):
    folder = with_one_more(family_folder(tmp_path / "base", kind))
    lora = Lora(dropout=0.0, target_modules="all-linear")
    edit(folder / "generation_config.json", eos_token_id=[9, 5])
    model, tokenizer = loaded(folder, dtype, lora, extend=add_tokens)
    save_language_model(model, tokenizer, tmp_path / "adapter")
    for place, adapters in ((folder, None), (folder, lora), (tmp_path / "adapter", None)):
        given = LanguageModel(str(place), dtype, adapters)
        real, _ = given.load()
        meta = given.on_meta(given.tokenizer())
        assert all(parameter.is_meta for parameter in meta.parameters())
        kinds = ({n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (meta, real))
        assert next(kinds) == next(kinds)
        assert eos_token_ids(meta) == eos_token_ids(real) == [9, 5, 2]


def test_new_rows_start_in_a_head_of_its_own_whatever_the_nested_config_says(tmp_path):
    base = family_model("gemma3")
    config = type(base.config)(**{**base.config.to_dict(), "tie_word_embeddings": False})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    model = LanguageModel(str(tmp_path / "base"), "float32", Lora(dropout=0.0))
    policy = GenerativePolicy(language_model=model, item_ids="token", prompt=PROMPT)
    policy.bind(Catalogue(["a", "b"], ["Toy Story", "Babe"]))
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = policy.chat.tokenizer(["Toy Story", "Babe"], add_special_tokens=False)["input_ids"]
    for end, first in (
        (policy.model.get_input_embeddings(), own.get_input_embeddings()),
        (policy.model.get_output_embeddings(), own.get_output_embeddings()),
    ):
        means = torch.stack([first.weight[torch.tensor(row)].mean(dim=0) for row in words])
        torch.testing.assert_close(torch.nn.functional.cosine_similarity(end.weight[330:], means), torch.ones(2))
    shaken_adapters(policy.model)
    policy.save_pretrained(tmp_path / "policy")
    again = GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert torch.equal(logits_of(again.model), logits_of(policy.model))
