"""Tiny models of the families of causal language models in transformers, with settings that change their logits."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PAD, BOS, EOS = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WINDOW = 6

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NO_DROPOUT = dict.fromkeys(
    (
        "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "dropout",
        "activation_dropout", "layerdrop", "resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "residual_dropout",
        "embedding_dropout", "resid_dropout", "embed_dropout", "router_jitter_noise", "input_jitter_noise",
    ),
    0.0,
)  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "router_aux_loss_coef": 0.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXED = {**LATENT, "index_topk": 5, "index_head_dim": 8, "index_n_heads": 2}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
DELTA = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GRANITE = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.5,
}
LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LOCAL_LOCAL_GLOBAL = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1}
LLAMA4 = {
    **EXPERTS,
    "num_experts_per_tok": 1,
    "intermediate_size": 16,
    "intermediate_size_mlp": 32,
    "head_dim": 8,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8,
    "moe_layers": [1],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """How a family is built.

    Attributes:
        kind: `model_type` of its config.
        options: of the config, besides `SIZES` and the tokens.
        text: options of the text part, for a model with several modalities.
        composite: class that stores it, where that is another one than loads it.
        tied: whether head and embedding share their weight.
        both: whether the family lets its config choose that.
        variant: whether it is another family with other options, so that only the whole model is checked.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    composite: str = ""
    tied: bool = False
    both: bool = True
    variant: bool = False


def _rope(**values: Any) -> dict[str, Any]:
    """Options for scaled rotary positions, under the name that this release of transformers has for them."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {"rope_theta": 10000.0, **values}}
    return {"rope_scaling": values, "rope_theta": 10000.0}


def _yarn(**values: Any) -> dict[str, Any]:
    return _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **values)


def _longrope(switch: int, **values: Any) -> dict[str, Any]:
    """Other frequencies for sequences of more than `switch` tokens, for heads of 8."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [8.0] * 4, "factor": 256 / switch}
    scaling = _rope(rope_type="longrope", original_max_position_embeddings=switch, **factors, **values)
    return {"original_max_position_embeddings": switch, **scaling}


FAMILIES: dict[str, Family] = {
    # Decoders of the llama kind.
    "llama": Family("llama"),
    "llama3": Family(
        "llama",
        _rope(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        variant=True,
    ),
    "llama_linear": Family("llama", _rope(rope_type="linear", factor=3.0), variant=True),
    "llama_dynamic": Family("llama", _rope(rope_type="dynamic", factor=3.0), variant=True),
    "llama_dynamic_switch": Family(
        "llama", {**_rope(rope_type="dynamic", factor=3.0), "max_position_embeddings": 20},
        variant=True,
    ),
    "llama_yarn": Family("llama", {**_yarn(), "attention_bias": True, "mlp_bias": True}, variant=True),
    "mistral": Family("mistral", {"sliding_window": WINDOW}),
    "ministral": Family("ministral", {**LOCAL_GLOBAL, "head_dim": 8}),
    "ministral3": Family(
        "ministral3", {"head_dim": 8, **_yarn(llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0, mscale=1.0)}
    ),
    "arcee": Family("arcee", _yarn()),
    "apertus": Family("apertus"),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}, tied=True),
    "seed_oss": Family("seed_oss", {"head_dim": 8}),
    "helium": Family("helium", {"head_dim": 8}),
    "hyperclovax": Family("hyperclovax", GRANITE),
    "jais2": Family("jais2", {"head_dim": 8}),
    "nanochat": Family("nanochat", {"final_logit_softcapping": 1.5}),
    "diffllama": Family("diffllama", {"head_dim": 8}),
    "bitnet": Family("bitnet"),
    "cwm": Family("cwm", {**LOCAL_GLOBAL, "head_dim": 8}),
    "internlm3": Family("internlm3", {"head_dim": 8}, variant=True),
    "qwen2": Family("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": Family("qwen3", {"head_dim": 8, **_yarn()}, tied=True),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", {"head_dim": 8, "pad_token_id": PAD}),
    "ernie4_5": Family("ernie4_5", {"use_bias": True, "head_dim": 8}, tied=True),
    "exaone4": Family("exaone4", {**LOCAL_GLOBAL, "head_dim": 8}),
    "granite": Family("granite", GRANITE),
    "granite_swa": Family("granite_swa", {**GRANITE, **LOCAL_GLOBAL, "layer_rope_theta": [10000.0, 500.0]}, tied=True),
    "olmo": Family("olmo", {"clip_qkv": 0.8}),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", LOCAL_LOCAL_GLOBAL),
    "glm": Family("glm", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "glm4": Family("glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "gemma": Family("gemma", {"head_dim": 8}, tied=True),
    "gemma2": Family(
        "gemma2",
        {
            **LOCAL_GLOBAL, "head_dim": 8, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
        tied=True,
    ),
    "gemma3_text": Family(
        "gemma3_text",
        {**LOCAL_LOCAL_GLOBAL, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5},
        tied=True,
    ),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8,
            "sliding_window": WINDOW, "final_logit_softcapping": 1.5, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        tied=True,
    ),
    "gemma4_text": Family(
        "gemma4_text",
        {
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8,
            "global_head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 1.5,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        },
        tied=True,
    ),
    "gemma4_unified_text": Family(
        "gemma4_unified_text", {**LOCAL_GLOBAL, "head_dim": 8, "global_head_dim": 8, "final_logit_softcapping": 1.5},
        tied=True,
    ),
    "vaultgemma": Family(
        "vaultgemma", {**LOCAL_GLOBAL, "head_dim": 8, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0},
        tied=True,
    ),
    "cohere": Family("cohere", {"logit_scale": 0.3, "use_qk_norm": True}, tied=True),
    "cohere2": Family("cohere2", {**LOCAL_GLOBAL, "logit_scale": 0.3}, tied=True),
    "stablelm": Family("stablelm", {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True}),
    "starcoder2": Family("starcoder2", {"sliding_window": WINDOW}, tied=True),
    "persimmon": Family("persimmon", {"partial_rotary_factor": 0.5}),
    "nemotron": Family("nemotron", {"partial_rotary_factor": 0.5}),
    "minicpm3": Family(
        "minicpm3", {**LATENT, "num_hidden_layers": 3, "scale_emb": 3, "scale_depth": 1.2, "dim_model_base": 16},
        tied=True,
    ),
    "phi": Family("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": Family("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "phi3_longrope": Family("phi3", _longrope(24)),  # rows of a batch on both sides of the switch
    "phi3_longrope_crossed": Family("phi3", _longrope(16), variant=True),  # completions that cross it
    "modernbert-decoder": Family("modernbert-decoder", LOCAL_GLOBAL, tied=True),
    "lfm3": Family(
        "lfm3",
        {
            "num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"], "head_dim": 8,
            "sliding_window": WINDOW, "conv_L_cache": 3,
        },
        tied=True,
    ),
    "youtu": Family("youtu", LATENT, tied=True),
    "hrm_text": Family("hrm_text", {"head_dim": 8, "H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [1]}),
    # Mixtures of experts.
    "mixtral": Family("mixtral", {**EXPERTS, "sliding_window": WINDOW}),
    "qwen2_moe": Family("qwen2_moe", EXPERTS),
    "qwen3_moe": Family("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "phimoe": Family("phimoe", {**EXPERTS, "lm_head_bias": True, "attention_bias": True}),
    "phimoe_longrope": Family(
        "phimoe", {**EXPERTS, **_longrope(24, short_mscale=1.1, long_mscale=1.3)}, variant=True
    ),
    "granitemoe": Family("granitemoe", {**EXPERTS, **GRANITE}),
    "granitemoeshared": Family("granitemoeshared", {**EXPERTS, **GRANITE, "shared_intermediate_size": 16}, tied=True),
    "granitemoe_swa": Family("granitemoe_swa", {**EXPERTS, **GRANITE, **LOCAL_GLOBAL}),
    "olmoe": Family("olmoe", EXPERTS),
    "flex_olmo": Family("flex_olmo", EXPERTS),
    "jetmoe": Family("jetmoe", {**EXPERTS, "kv_channels": 8, "intermediate_size": 16}, tied=True),
    "dbrx": Family(
        "dbrx",
        {
            "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "attn_config": {
                "kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
        both=False,
    ),
    "deepseek_v2": Family(
        "deepseek_v2", {**EXPERTS, **LATENT, **DENSE_SPARSE, "n_shared_experts": 1, "routed_scaling_factor": 1.3}
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **EXPERTS, **LATENT, **DENSE_SPARSE, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
            **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.8),
        },
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        {**EXPERTS, **INDEXED, **DENSE_SPARSE, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    "glm4_moe": Family("glm4_moe", {**EXPERTS, "head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True}),
    "glm4_moe_lite": Family("glm4_moe_lite", {**EXPERTS, **LATENT, **DENSE_SPARSE}),
    "dots1": Family(
        "dots1", {**EXPERTS, "head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, **LOCAL_GLOBAL}
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", {**EXPERTS, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}, tied=True
    ),
    "exaone_moe": Family("exaone_moe", {**EXPERTS, **LOCAL_GLOBAL, **DENSE_SPARSE, "head_dim": 8}),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**EXPERTS, "moe_topk": [2, 2], "head_dim": 8}),
    "hy_v3": Family("hy_v3", {**EXPERTS, **DENSE_SPARSE, "head_dim": 8}),
    "solar_open": Family("solar_open", {**EXPERTS, "head_dim": 8}),
    "afmoe": Family(
        "afmoe", {**EXPERTS, **LOCAL_GLOBAL, "head_dim": 8, "num_shared_experts": 1, "mup_enabled": True}
    ),
    "laguna": Family("laguna", {**EXPERTS, **LOCAL_GLOBAL, **DENSE_SPARSE, "head_dim": 8}),
    "mellum": Family("mellum", {**EXPERTS, **LOCAL_GLOBAL, "head_dim": 8}),
    "minimax_m2": Family("minimax_m2", {**EXPERTS, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 16}),
    "mimo_v2_flash": Family("mimo_v2_flash", {**EXPERTS, **DENSE_SPARSE, "head_dim": 12, "v_head_dim": 8,
                                              "layer_types": ["full_attention", "sliding_attention"],
                                              "sliding_window": WINDOW}),
    "cohere2_moe": Family(
        "cohere2_moe", {**EXPERTS, **LOCAL_GLOBAL, "head_dim": 8, "logit_scale": 0.3, "num_shared_experts": 1},
        tied=True,
    ),
    "aria_text": Family("aria_text", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "gpt_oss": Family("gpt_oss", {**EXPERTS, **LOCAL_GLOBAL, "head_dim": 8}),
    "llama4_text": Family("llama4_text", LLAMA4),
    "llama4_text_temperature": Family(
        "llama4_text",
        {**LLAMA4, "floor_scale": 4},
        variant=True,
    ),
    "longcat_flash": Family(
        "longcat_flash",
        {
            **LATENT, "num_layers": 1, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2,
            "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "head_dim": 4,
        },
    ),
    # Recurrent layers, alone or beside attention.
    "mamba": Family("mamba", {"state_size": 4, "time_step_rank": 2}, tied=True),
    "falcon_mamba": Family("falcon_mamba", {"state_size": 4, "time_step_rank": 2}, tied=True),
    "mamba2": Family("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "rwkv": Family("rwkv", {"attention_hidden_size": 32, "context_length": 256}),
    "xlstm": Family("xlstm", {"num_heads": 4, "embedding_dim": 32, "num_blocks": 2, "chunk_size": 8}),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 1.5, "head_dim": 8},
        tied=True),
    "jamba": Family(
        "jamba",
        {
            **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False,
        },
    ),
    "bamba": Family("bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": Family(
        "falcon_h1",
        {
            **MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.4, "embedding_multiplier": 1.5, "key_multiplier": 0.7,
            "attention_out_multiplier": 0.8, "ssm_out_multiplier": 0.9, "mlp_multipliers": [0.8, 1.2],
            "projectors_bias": True,
        },
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **EXPERTS, **GRANITE, **MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16,
            "position_embedding_type": "rope",
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4, "head_dim": 8,
            "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8,
            "use_mamba_kernels": False, "n_routed_experts": 4, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        }),
    "zamba": Family(
        "zamba",
        {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "n_mamba_heads": 2, "use_mamba_kernels": False,
        },
        tied=True,
    ),
    "zamba2": Family(
        "zamba2",
        {
            "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
            "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8,
            "adapter_rank": 4, "use_mamba_kernels": False, "use_mem_rope": True, "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        tied=True),
    "lfm2": Family(
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        tied=True,
    ),
    "lfm2_moe": Family(
        "lfm2_moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, tied=True
    ),
    "minimax": Family(
        "minimax",
        {
            **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8, "head_dim": 8,
            "full_attn_alpha_factor": 0.8, "linear_attn_beta_factor": 1.2, "mlp_alpha_factor": 0.9,
        }),
    "qwen3_next": Family("qwen3_next", {**EXPERTS, **DELTA, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_5_text": Family("qwen3_5_text", {**DELTA, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text", {**EXPERTS, **DELTA, "layer_types": ["linear_attention", "full_attention"]}
    ),
    "olmo_hybrid": Family("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    "kimi_linear": Family(
        "kimi_linear",
        {
            **EXPERTS, **LATENT, **DENSE_SPARSE, "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2,
        },
    ),
    "bailing_hybrid": Family(
        "bailing_hybrid",
        {
            **EXPERTS, **LATENT, "mlp_layer_types": ["dense", "sparse"], "num_expert_group": 2, "topk_group": 1,
            "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4,
            "num_experts_per_token": 2,
        },
    ),
    # Older decoders.
    "gpt2": Family("gpt2", {"n_inner": 48}, tied=True),
    "gpt2_untied": Family("gpt2", {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True}, variant=True),
    "openai-gpt": Family("openai-gpt", {}, tied=True),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
            "num_hidden_layers": None, "num_attention_heads": None,
        },
        tied=True,
    ),
    "gpt_neox": Family("gpt_neox", {"partial_rotary_factor": 0.5}),
    "gpt_neox_japanese": Family("gpt_neox_japanese", {"intermediate_multiple_size": 2}, tied=True),
    "gptj": Family("gptj", {"rotary_dim": 4, "n_inner": 48}),
    "codegen": Family("codegen", {"rotary_dim": 4, "n_inner": 48}),
    "gpt_bigcode": Family("gpt_bigcode", {"n_inner": 48}, tied=True),
    "bloom": Family("bloom", {"apply_residual_connection_post_layernorm": True}, tied=True),
    "falcon": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, tied=True),
    "falcon_alibi": Family(
        "falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4, "bias": True, "parallel_attn": False},
        tied=True,
        variant=True,
    ),
    "mpt": Family(
        "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "attn_config": {"clip_qkv": 0.8}},
        tied=True,
    ),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, tied=True),
    "opt_projected": Family(
        "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, tied=True, variant=True
    ),
    "xglm": Family("xglm", {"ffn_dim": 48, "d_model": 32, "attention_heads": 4, "num_layers": 2}, tied=True),
    "biogpt": Family("biogpt", {}, tied=True),
    "ctrl": Family("ctrl", {"dff": 48}, tied=True),
    "bert": Family("bert", {"is_decoder": True}, tied=True),
    "bert-generation": Family("bert-generation", {"is_decoder": True}, tied=True),
    "roberta": Family("roberta", {"is_decoder": True}, tied=True),
    "electra": Family("electra", {"is_decoder": True, "embedding_size": 16}, tied=True),
    "rembert": Family("rembert", {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24}),
    # Several modalities in one config.
    "gemma3": Family(
        "gemma3",
        {"mm_tokens_per_image": 4, "vision_config": VISION},
        text={**LOCAL_LOCAL_GLOBAL, "head_dim": 8, "query_pre_attn_scalar": 8},
        tied=True,
    ),
    "gemma4": Family(
        "gemma4",
        {"vision_config": None, "audio_config": None},
        text={
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8,
            "global_head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 1.5,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        },
        tied=True,
    ),
    "llama4": Family(
        "llama4",
        {"vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
        text=LLAMA4,
        composite="Llama4ForConditionalGeneration",
    ),
    "mllama": Family(
        "mllama",
        {
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
                "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "max_num_tiles": 1,
                "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
            }
        },
        text={"cross_attention_layers": [1], "num_hidden_layers": 3},
        composite="MllamaForConditionalGeneration",
    ),
    "qwen3_5": Family(
        "qwen3_5",
        {
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4,
                "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
            }
        },
        text={**DELTA, "layer_types": ["linear_attention", "full_attention"]},
        composite="Qwen3_5ForConditionalGeneration",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """What the library refuses, since transformers itself has no consistent answer, or the model is built otherwise.

    Attributes:
        reason: short.
        checks: regular expressions of the checks that are refused; every one if empty.
    """

    reason: str
    checks: tuple[str, ...] = ()


_SHARED = (r"(model|^adapters): generate", "retrieval: ", "item_ids title", "semantic")
_MAMBA = Refusal(
    "as other recurrent layers, and one linear layer's weight is used past its adapter",
    (*_SHARED, "^adapters: completion_logps"),
)
_RECURRENT = Refusal("completions cannot share the state of recurrent layers", _SHARED)
REFUSED: dict[str, Refusal] = {
    "llama_dynamic_switch": Refusal(
        "frequencies of every row depend on the longest one beyond the model's positions",
        ("generate", "completion_logps", "retrieval: re", "_logps", "item_ids title"),
    ),
    "phi3_longrope_crossed": Refusal(
        "frequencies change within a completion",
        ("generate", "_logps", "retrieval: re", "beams", "title: run_prompt"),
    ),
    "modernbert-decoder": Refusal("the head has more than one layer"),
    "bert": Refusal("the head has more than one layer"),
    "roberta": Refusal("the head has more than one layer"),
    "electra": Refusal("the head has more than one layer"),
    "rembert": Refusal("the head has more than one layer"),
    "rwkv": Refusal("the layers ignore the mask of padding"),
    "xlstm": Refusal("the layers ignore the mask of padding"),
    "recurrent_gemma": Refusal("the layers ignore the mask of padding, and keep their state outside of any cache"),
    "llama4_text_temperature": Refusal("the temperature of attention counts padding as positions"),
    "deepseek_v32": Refusal("a cache gives other results than none, and its indexer sees padding"),
    "openai-gpt": Refusal("there is no cache", _SHARED),
    "mllama": Refusal(
        "layers of cross attention keep no keys of text, and the head has fewer rows than the embedding",
        (*_SHARED, "item_ids token"),
    ),
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": _RECURRENT,
    "jamba": _RECURRENT,
    "bamba": _RECURRENT,
    "falcon_h1": _RECURRENT,
    "granitemoehybrid": _RECURRENT,
    "nemotron_h": _RECURRENT,
    "zamba": _RECURRENT,
    "zamba2": _RECURRENT,
    "lfm2": _RECURRENT,
    "lfm2_moe": _RECURRENT,
    "lfm3": _RECURRENT,
    "minimax": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5": _RECURRENT,
    "olmo_hybrid": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "bailing_hybrid": _RECURRENT,
}


def is_available(name: str) -> bool:
    """Whether this release of transformers has the family."""
    return FAMILIES[name].kind in CONFIG_MAPPING_NAMES


def make_tokenizer() -> Any:
    """A byte-level tokenizer without merges, with a short chat template: 259 tokens."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS]
    )
    made.chat_template = TEMPLATE
    return made


@functools.cache
def vocabulary() -> int:
    """Tokens of `make_tokenizer`."""
    return len(make_tokenizer())


def make_config(name: str, *, tied: bool | None = None) -> Any:
    """The config of a family.

    Args:
        name: in `FAMILIES`.
        tied: whether head and embedding share their weight; None for the usual of the family.
    """
    family = FAMILIES[name]
    tokens = {"vocab_size": vocabulary(), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    ends = {"tie_word_embeddings": family.tied if tied is None else tied}
    sizes = {**SIZES, "vocab_size_per_layer_input": vocabulary(), **tokens, **NO_DROPOUT}
    if family.text is not None:
        sub = {key: value for key, value in {**sizes, **ends, **family.text}.items() if value is not None}
        return AutoConfig.for_model(family.kind, **family.options, **ends, text_config=sub)
    given = {**sizes, **ends, **family.options}
    return AutoConfig.for_model(family.kind, **{key: value for key, value in given.items() if value is not None})


@torch.no_grad()
def shake(model: Any, seed: int = 0) -> Any:
    """Moves every weight away from zero and from its start, the same way each time."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.is_floating_point():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for label, buffer in sorted(model.named_buffers()):
        if label.endswith("correction_bias"):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def make_model(name: str, *, tied: bool | None = None, seed: int = 0) -> Any:
    """A tiny model of a family, float32, in evaluation mode."""
    torch.manual_seed(seed)
    config, composite = make_config(name, tied=tied), FAMILIES[name].composite
    if composite:
        model = getattr(transformers, composite)(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return shake(model.float(), seed).eval()


def write_family(name: str, folder: Path, *, tied: bool | None = None) -> Path:
    """Stores such a model with its tokenizer as a Hugging Face folder."""
    make_model(name, tied=tied).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
