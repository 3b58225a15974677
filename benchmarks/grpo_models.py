"""The models, tokens and memory readings that both sides of a benchmark share."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

VOCABULARY = 49_152
SMOLLM2_FOLDER = Path(__file__).parent.parent / "build" / "smollm2-135m"


def llama_20m():
    """20.5 million parameters in float32: 8 layers of width 256, tied embeddings of 49,152 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=4, tie_word_embeddings=True))


def smollm2():
    """SmolLM2-135M-Instruct in bfloat16, which never ends a completion."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2_FOLDER, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = None, 0
    return model


MODELS = {"llama-20m": llama_20m, "smollm2-135m": smollm2}


def prompts(shape, steps, seed=0):
    """Token ids of `shape.prompts` prompts for each step; their lengths lie within 4 % of `shape.prompt_length`."""
    random = torch.Generator().manual_seed(seed)
    around = shape.prompt_length // 25
    return [
        [
            torch.randint(2, VOCABULARY, (shape.prompt_length + int(more),), generator=random).tolist()
            for more in torch.randint(-around, around + 1, (shape.prompts,), generator=random)
        ]
        for _ in range(steps)
    ]


def rewards_of(completions):
    """A reward in [0, 1) that differs within a group, from lists of token ids."""
    return [sum(tokens) % 97 / 97 for tokens in completions]


class PeakMemory:
    """Most memory above what was held at `start`, in MB: resident in this process (Linux), or allocated on the GPU."""

    def __init__(self, device="cpu"):
        self.on_cpu = device == "cpu"

    def start(self):
        if self.on_cpu:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        self.held = _status("VmRSS") if self.on_cpu else torch.cuda.memory_allocated() / 2**20

    def stop(self):
        return (_status("VmHWM") if self.on_cpu else torch.cuda.max_memory_allocated() / 2**20) - self.held


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
