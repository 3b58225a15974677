"""Reasoning in text followed by an answer marker, and the hidden state behind it: pure tensor functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirec_pl.policy.language_models.generation import eos_token_ids
from minirec_pl.policy.language_models.logps import completion_states, token_logps
from minirec_pl.policy.language_models.sampling import Prompt
from minirec_pl.policy.prompt import EncodedPrompts


class Reasoning(NamedTuple):
    """G sampled reasonings of each of B prompts.

    Attributes:
        texts: int64 [B, G, L], tokens, up to and including the one that ends a text; -1 after that.
        logps: float [B, G, L], log-probabilities with which they were drawn; 0 where there is no token.
    """

    texts: Tensor
    logps: Tensor


class ReasoningPass(NamedTuple):
    """What the model makes of reasonings, with gradient.

    Attributes:
        logps: float [B, G, L], log-probability of each token in nats; 0 where there is none.
        entropy: float [B, G, L], entropy of each token's distribution in nats, without gradient.
        states: float [B, G, D], last hidden state at the last token of the marker.
        tokens: tokens that went through the model, padding not counted.
    """

    logps: Tensor
    entropy: Tensor
    states: Tensor
    tokens: int


def unit(states: Tensor) -> Tensor:
    """States [..., D] at length 1, float32 or their wider dtype; a state of zeros stays one."""
    return nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)


def kept_tokens(texts: Tensor, ends: list[int]) -> Tensor:
    """How many tokens of each text stand before the marker, int64 [...]: all but one that ends it."""
    return ((texts >= 0) & ~torch.isin(texts, torch.tensor(ends, device=texts.device))).sum(dim=-1)


def with_marker(texts: Tensor, kept: Tensor, marker: Tensor) -> tuple[Tensor, Tensor]:
    """Texts with the marker in place of what ends them, and a place more, whose producing state is the marker's.

    Args:
        texts: int64 [B, G, L], see `Reasoning`.
        kept: int64 [B, G], from `kept_tokens`.
        marker: int64 [M].

    Returns:
        Tokens int64 [B, G, L + M + 1] and which of them count, bool of the same shape.

    Example:
        >>> with_marker(torch.tensor([[[5, 2, -1]]]), torch.tensor([[1]]), torch.tensor([8, 9]))[0]
        tensor([[[5, 8, 9, 0, 0, 0]]])
    """
    size = len(marker)
    tokens = nn.functional.pad(texts, (0, size + 1), value=0)
    place = torch.arange(tokens.shape[-1], device=texts.device) - kept[..., None]
    tokens = tokens.masked_fill(place >= 0, 0)
    tokens = torch.where((place >= 0) & (place < size), marker[place.clamp(0, size - 1)], tokens)
    return tokens, place <= size


def read_reasoning(
    model: Any,
    prompts: EncodedPrompts,
    texts: Tensor,
    marker: Tensor,
    temperature: float = 1.0,
    *,
    with_logps: bool = True,
    ran: Prompt | None = None,
) -> ReasoningPass:
    """One pass over prompts, reasonings and marker; the prompt is run once for its group where that is exact.

    The token that ends a reasoning is a choice of the policy, so it has a log-probability, but the marker follows the
    text as if it were not there.

    Args:
        model: a causal language model of transformers, also inside peft.
        prompts: of B samples.
        texts: int64 [B, G, L], see `Reasoning`.
        marker: int64 [M], at least one token.
        temperature: divides the logits, as in sampling.
        with_logps: whether the log-probabilities are wanted; 0 otherwise.
        ran: the prompts of the samples, where they have been run already; their tokens are then not counted.
    """
    input_ids, mask = (part.index_select(0, prompts.row) for part in (prompts.input_ids, prompts.mask))
    kept = kept_tokens(texts, eos_token_ids(model))
    tokens, counted = with_marker(texts, kept, marker)
    states = completion_states(model, input_ids, mask, tokens, counted, ran)
    last = (kept + len(marker))[..., None, None].expand(-1, -1, 1, states.shape[-1])
    answer = states.gather(2, last).squeeze(2)
    spent = int(kept.sum()) + kept.numel() * len(marker) + (int(mask.sum()) if ran is None else 0)
    if not with_logps or not texts.shape[-1]:
        nothing = torch.zeros(texts.shape, dtype=torch.promote_types(states.dtype, torch.float32), device=texts.device)
        return ReasoningPass(nothing, nothing, answer, spent)
    logps, entropy = token_logps(model, states[:, :, : texts.shape[-1]], texts.clamp(min=0), texts >= 0, temperature)
    return ReasoningPass(logps, entropy, answer, spent)
