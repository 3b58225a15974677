"""Which layers LoRA reaches, by an own walk over the modules of many families."""

import json
import warnings

import pytest
import torch
from helpers.chat_models import CATALOGUE, PROMPT
from helpers.family_models import FAMILIES, family_folder, family_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from minirec_pl import InputError
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora, RetrievalPolicy
from minirec_pl.policy.language_models.adapters import adapter_coverage
from minirec_pl.policy.language_models.causal_lm import head_of

DEFAULT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NOT_REACHED = {
    "llama": set(),
    "phi3": {"qkv_proj", "gate_up_proj"},
    "mixtral": {"experts.gate_up_proj", "experts.down_proj"},
    "qwen2_moe": {"experts.gate_up_proj", "experts.down_proj"},
    "opt": {"out_proj", "fc1", "fc2"},
    "glm4": {"gate_up_proj"},
    "gemma3": set(),
}
NO_NAME = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "gpt_neox": {"query_key_value", "dense_h_to_4h"}}


def adapted(model):
    """Full names of the layers with an adapter, as the model without adapters calls them."""
    names = (name for name, _ in model.get_base_model().named_parameters() if "lora_A" in name)
    return {name.split(".lora_A")[0] for name in names}


def linear_layers(kind):
    """Full names of the linear layers of the text decoder, the head and routers left out."""
    model = family_model(kind)
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    names -= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    return {name for name in names if "vision" not in name and not name.endswith(("shared_expert_gate", "mlp.gate"))}


def loaded(folder, lora):
    """A model with new adapters, and what was said of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = LanguageModel(str(folder), "float32", lora).load()
    return model, [str(one.message) for one in caught if "target_modules" in str(one.message)]


@pytest.mark.parametrize("kind", NOT_REACHED)
def test_the_default_names_what_it_does_not_reach(tmp_path, kind):
    model, said = loaded(family_folder(tmp_path, kind), Lora(dropout=0.0))
    layers = linear_layers(kind)
    assert adapted(model) == {name for name in layers if name.rsplit(".", 1)[-1] in DEFAULT}
    if not NOT_REACHED[kind]:
        assert adapted(model) == layers
        assert not said
        return
    (text,) = said
    for name in NOT_REACHED[kind] | (DEFAULT - {name.rsplit(".", 1)[-1] for name in layers}):
        assert name in text
    more = layers - adapted(model)
    assert ("set --model.policy.language_model.lora.target_modules to all-linear" in text) == bool(more)
    assert {name.rsplit(".", 1)[-1] for name in more} <= NOT_REACHED[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_reaches_every_linear_layer_but_head_and_routers(tmp_path, kind):
    model, said = loaded(family_folder(tmp_path, kind), Lora(dropout=0.0, target_modules="all-linear"))
    assert adapted(model) == linear_layers(kind)
    if kind.endswith(("mixtral", "moe")):
        (text,) = said
        assert "experts.gate_up_proj" in text
        assert "routers stay without: gate" in text
        assert "set --model.policy.language_model.lora.target_modules to all-linear" not in text
    else:
        assert not said
    head_of(model)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "qwen2_moe"])
def test_each_adapter_gets_a_gradient_from_text(tmp_path, kind):
    model, _ = loaded(family_folder(tmp_path, kind), Lora(dropout=0.0, target_modules="all-linear"))
    ids = torch.randint(6, 330, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert all(bool(gradient.any()) for name, gradient in trained.items() if "lora_B" in name)


def test_a_regular_expression_is_matched_against_whole_names(tmp_path):
    folder = family_folder(tmp_path, "phi3")
    model, said = loaded(folder, Lora(target_modules=r"model\.layers\.1\.(self_attn|mlp)\..*_proj"))
    assert adapted(model) == {name for name in linear_layers("phi3") if ".1." in name}
    assert "qkv_proj (1)" in said[0].split("none on")[0]
    assert "qkv_proj (1)" in said[0].split("none on")[1]
    for pattern, message in (
        ("qkv_proj", r"names no linear layer of Phi3ForCausalLM \(.* the whole of model\.layers\.0\."),
        ("(qkv", "not a regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            loaded(folder, Lora(target_modules=pattern))


@pytest.mark.parametrize("kind", NO_NAME)
def test_names_of_no_layer_are_refused_with_those_there_are(tmp_path, kind):
    with pytest.raises(InputError, match="or all-linear") as refused:
        loaded(family_folder(tmp_path, kind), Lora())
    assert all(name in str(refused.value) for name in NO_NAME[kind])


def test_a_name_of_no_layer_beside_others_is_told(tmp_path):
    _, said = loaded(family_folder(tmp_path, "llama"), Lora(target_modules=[*sorted(DEFAULT), "qkv_proj"]))
    assert len(said) == 1
    assert "no layer is called qkv_proj" in said[0]


def test_an_adapter_on_the_head_is_still_refused(tmp_path):
    model, _ = loaded(family_folder(tmp_path, "llama"), Lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match="leave lm_head out of target_modules"):
        head_of(model)


def test_adapters_on_fused_experts_need_dropout_zero_and_count_as_carried():
    with pytest.raises(InputError, match=r"set --model\.policy\.language_model\.lora\.dropout to 0"):
        Lora().adapt(family_model("qwen3_moe"))
    lora = Lora(dropout=0.0)
    coverage = lora.coverage(lora.adapt(family_model("qwen3_moe")))
    assert coverage.carried == {
        **dict.fromkeys(["k_proj", "o_proj", "q_proj", "v_proj"], 2),
        **dict.fromkeys(["experts.down_proj", "experts.gate_up_proj"], 2),
    }
    assert not coverage.missing
    assert not coverage.unmatched


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(qkv|o)_proj"])
@pytest.mark.parametrize("kind", ["phi3", "gemma3"])
def test_a_stored_policy_opens_with_its_adapters_and_says_nothing(tmp_path, kind, targets):
    folder = family_folder(tmp_path / "base", kind)
    lora = Lora(dropout=0.0, target_modules=targets)
    model = LanguageModel(str(folder), "float32", lora)
    policy = GenerativePolicy(language_model=model, prompt=PROMPT, item_ids="token")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.bind(CATALOGUE)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    policy.save_pretrained(tmp_path / "policy")
    side = json.loads((tmp_path / "policy" / "minirec.json").read_text())
    assert side["language_model"]["lora"]["target_modules"] == targets
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert not [one for one in caught if "target_modules" in str(one.message)]
    assert again.chat.language_model.lora == lora
    assert adapted(again.model) == adapted(policy.model)
    ids = torch.randint(6, 330, (2, 9))
    with torch.no_grad():
        one, other = (each.model.eval()(input_ids=ids).logits for each in (policy, again))
    assert torch.equal(one, other)


def test_a_model_without_adapters_carries_none():
    model = family_model("opt")
    coverage = adapter_coverage(model)
    assert coverage.carried == {}
    assert sum(coverage.missing.values()) == len(linear_layers("opt"))


def test_a_retrieval_policy_loads_a_model_of_several_modalities(tmp_path):
    folder = family_folder(tmp_path, "gemma3")
    policy = RetrievalPolicy(LanguageModel(str(folder), "float32", Lora()), prompt=PROMPT)
    policy.bind(CATALOGUE)
    assert adapted(policy.model) == linear_layers("gemma3")
