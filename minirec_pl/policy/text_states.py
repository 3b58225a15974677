"""Texts as vectors of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minirec_pl.policy.catalogue_text import encode_catalogue
from minirec_pl.policy.language_models.causal_lm import body_of, by_length, pad_left, places
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

_TOKENS = 4096  # of a batch, padding included
_LONGEST = 256  # tokens of a text


def text_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the last hidden states over the first 256 tokens of each text, in batches of similar length.

    Args:
        model: a causal language model of transformers, also inside peft.
        tokenizer: its tokenizer.
        texts: at least one; control tokens in them are plain text.

    Returns:
        float32 [n, D].

    Raises:
        InputError: if there is no text.
    """
    if not texts:
        raise InputError("there is no text to encode: give at least one")
    ids = [row[:_LONGEST] or [tokenizer.eos_token_id] for row in encode_catalogue(tokenizer, texts)]
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        body = body_of(model)

        def means(rows: Tensor) -> Tensor:
            tokens, mask = pad_left([ids[row] for row in rows.tolist()], tokenizer.pad_token_id, device)
            body.rules.check(mask.sum(dim=1), 0, "a text of the catalogue".format)
            last = body(input_ids=tokens, attention_mask=mask, position_ids=places(mask), use_cache=False)
            states: Tensor = last.last_hidden_state.float()
            return (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

        return by_length(torch.tensor([len(row) for row in ids]), means, _TOKENS)
