"""Texts as vectors of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import body_of
from minirec_pl.policy.rollout import evaluation_mode

_TOKENS = 4096  # of a batch, padding included
_LONGEST = 256  # tokens of a text


def text_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the last hidden states over the first 256 tokens of each text, in batches of similar length.

    Args:
        model: a causal language model of transformers, also inside peft.
        tokenizer: its tokenizer.
        texts: at least one; special tokens in them are plain text.

    Returns:
        float32 [n, D].

    Raises:
        InputError: if there is no text.
    """
    if not texts:
        raise InputError("there is no text to encode: give at least one")
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [row[:_LONGEST] or [tokenizer.eos_token_id] for row in tokens]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = model.get_input_embeddings().weight.device
    states: Tensor | None = None
    with evaluation_mode(model):
        body = body_of(model)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(ids[order[stop]]) * (stop + 1 - start) <= _TOKENS:
                stop += 1
            rows = order[start:stop]
            width = len(ids[rows[-1]])
            padded = torch.full((len(rows), width), tokenizer.pad_token_id)
            mask = torch.zeros(len(rows), width, dtype=torch.int64)
            for row, index in enumerate(rows):
                padded[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            padded, mask = padded.to(device), mask.to(device)
            last = body(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state.float()
            means = (last * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            states = means.new_zeros(len(ids), means.shape[1]) if states is None else states
            states[torch.tensor(rows, device=device)] = means
            start = stop
    assert states is not None
    return states
