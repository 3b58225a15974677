"""The supervised stage of a generative policy: the item after every prefix, a whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import body_of, head_of
from minirec_pl.policy.prompt import EncodedPrompts

if TYPE_CHECKING:
    from minirec_pl.policy.generator import GenerativePolicy


def check_positions(model: Any, length: int) -> None:
    """Refuses `length` tokens if the model has fewer positions.

    Raises:
        InputError: if it has.
    """
    _refuse(model, length, lambda: "")


def check_prompts(model: Any, prompts: EncodedPrompts, room: int, sample_ids: Tensor | None) -> None:
    """As `check_positions`, for prompts that leave less than `room` positions; names the sample_id [B] if known."""

    def name() -> str:
        if sample_ids is None:
            return ""
        return f" of sample {int(sample_ids[prompts.mask.sum(dim=1)[prompts.row].argmax()])}"

    _refuse(model, prompts.mask.shape[1] + room, name)


def _refuse(model: Any, length: int, name: Callable[[], str]) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise InputError(
            f"prompt and item id{name()} take {length} tokens and the model has {longest} positions: lower "
            "data.history_window, or train a policy with a larger max_position_embeddings"
        )


def pairs_as_prompts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`history` [P, T] and an empty `seen` for the pairs `row` and `position` [P] of `sequence` [B, T]."""
    sequence, row, position = batch["sequence"], batch["row"], batch["position"]
    columns = torch.arange(sequence.shape[1], device=sequence.device)
    history = sequence[row].masked_fill(columns > position[:, None], -1)
    return {"history": history, "seen": torch.full((len(row), 1), -1, device=row.device)}


def sequence_nll(policy: GenerativePolicy, batch: Mapping[str, Tensor], dropout: float) -> Tensor:
    """See `GenerativePolicy.sequence_nll`."""
    sequence, row, position, target = (batch[key] for key in ("sequence", "row", "position", "target"))
    if policy.id_length > 1 or policy.chat is not None:
        logps, _, _ = policy.completion_logps(pairs_as_prompts(batch), target[:, None])
        return -logps.sum() / max(1, len(target))
    first_tokens, head = policy.trie.item_tokens[:, 0], head_of(policy.model)
    tokens = torch.where(sequence >= 0, first_tokens[sequence.clamp(min=0)], policy.pad_token_id)
    tokens = nn.functional.pad(tokens, (1, 0), value=policy.bos_token_id)
    check_positions(policy.model, tokens.shape[1])
    embeddings = policy.model.get_input_embeddings()(tokens).to(head.weight.dtype)
    embeddings = nn.functional.dropout(embeddings, dropout, policy.training)
    states = body_of(policy.model)(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    # The gradient of index_select adds up in a fixed order, that of indexing does not on several threads.
    states = states.flatten(0, 1).index_select(0, row * states.shape[1] + position + 1)
    states = nn.functional.dropout(states, dropout, policy.training)
    return nn.functional.cross_entropy(head.logits(states, first_tokens), target, reduction="sum") / max(1, len(target))
