"""Tiny models of many families in folders, with the tokenizer of `chat_models`."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from .chat_models import chat_tokenizer
from .plain_policy import shaken
from .tiny_llm import SIZES

EXPERTS = {"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "qwen3_moe": EXPERTS,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "glm4": {"num_key_value_heads": 2, "head_dim": 4},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 8.0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 4, "final_logit_softcapping": 30.0},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "rwkv": {"attention_hidden_size": 16},
    "gemma3": {"num_key_value_heads": 2, "head_dim": 4},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def family_model(kind, vocabulary=330, **options):
    """A model in float32 with weights far from zero; `gemma3` has a vision tower beside its text decoder."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": vocabulary}
    sizes = {**SIZES, **FAMILIES[kind], "max_position_embeddings": 256, **tokens, **options}
    if kind == "gemma3":
        vision = {**VISION, "image_size": 28, "patch_size": 14}
        config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    else:
        config = AutoConfig.for_model(kind, **sizes)
    return shaken(AutoModelForCausalLM.from_config(config))


def family_folder(folder, kind, **options):
    family_model(kind, **options).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
