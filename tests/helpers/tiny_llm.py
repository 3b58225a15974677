"""Small language models with several ends of sequence, prompts of unequal length, and generation by its definition."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

PAD, EOS = 0, (2, 5)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "phi3": {},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False, "use_sliding_window": False},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}


def longrope(switch):
    """Options of a Phi-3 config whose positions change after `switch` tokens; a head has 4 values."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    factors = {"short_factor": [1.0, 1.0], "long_factor": [8.0, 3.0]}
    return {"original_max_position_embeddings": switch, "rope_parameters": {**rope, **factors}}


def tiny_llm(kind="llama", vocabulary=40, seed=0, **options):
    """A model in evaluation mode whose distributions are far from uniform."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": vocabulary, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": list(EOS)}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes = {**SIZES, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **{**sizes, **KINDS[kind], **tokens, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def prompts(*lengths, vocabulary=40, seed=1):
    """Prompts padded on the left: input_ids and attention_mask, int64 [B, T]."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(6, vocabulary, (length,), generator=random).tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


class PlainModel:
    """The same model in float64: one sequence at a time, no cache, no padding, no chunks."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()

    def next_logits(self, tokens):
        return self.model(input_ids=torch.tensor([tokens])).logits[0, -1]

    def token_logps(self, prompt, completion, temperature=1.0):
        """Log-probability and entropy of each token of a completion, float64 [L] each, with gradient."""
        logits = self.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1)
        chosen = logps[torch.arange(len(completion)), torch.tensor(completion)]
        return chosen, -(logps.exp() * logps).sum(dim=-1)


def rows_of(ids, mask):
    """Lists of the real tokens."""
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
