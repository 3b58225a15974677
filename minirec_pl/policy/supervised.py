"""The supervised stage of a generative policy: the item after every prefix, a whole sequence at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirec_pl.policy.item_id_generator import ItemIdGenerator
from minirec_pl.policy.language_models.causal_lm import body_of, decoder_of, head_of, places
from minirec_pl.policy.language_models.positions import position_rules
from minirec_pl.policy.prompt import EncodedPrompts, check_positions
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import no_loss


def pairs_as_prompts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`history` [P, T] and an empty `seen` for the pairs `row` and `position` [P] of `sequence` [B, T]."""
    sequence, row, position = batch["sequence"], batch["row"], batch["position"]
    columns = torch.arange(sequence.shape[1], device=sequence.device)
    history = sequence[row].masked_fill(columns > position[:, None], -1)
    return {"history": history, "seen": torch.full((len(row), 1), -1, device=row.device)}


class Stretches(NamedTuple):
    """The prompts of warm-start pairs, those that begin another one left to it.

    Attributes:
        input_ids: int64 [U, T], the prompts that are run, padded on the left.
        mask: int64 [U, T], which tokens are real.
        row: int64 [P], the prompt that each pair's is the beginning of.
        column: int64 [P], the last token of the pair's in it.
    """

    input_ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor


def stretches(prompts: EncodedPrompts, switch: int | None = None) -> Stretches:
    """Leaves out the prompts that others begin with, unless the model's positions change after `switch` tokens between.

    Example:
        >>> ids = torch.tensor([[0, 7, 1], [7, 1, 4], [0, 0, 5]])
        >>> made = stretches(EncodedPrompts(ids, (ids > 0).long(), torch.tensor([0, 1, 2])))
        >>> made.input_ids.tolist(), made.row.tolist(), made.column.tolist()
        ([[7, 1, 4], [0, 0, 5]], [0, 0, 1], [1, 2, 2])
    """
    lengths = prompts.mask.sum(dim=1).tolist()
    width = prompts.mask.shape[1]
    tokens = [row[width - n :] for row, n in zip(prompts.input_ids.tolist(), lengths, strict=True)]
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    longest = list(range(len(tokens)))
    for place, after in reversed(list(pairwise(order))):
        whole = longest[after]
        apart = switch is not None and lengths[place] <= switch < lengths[whole]
        if not apart and tokens[after][: lengths[place]] == tokens[place]:
            longest[place] = whole
    kept, row_of = torch.unique(torch.tensor(longest), return_inverse=True)
    column_of = width - torch.tensor(lengths)[longest] + torch.tensor(lengths) - 1
    device = prompts.row.device
    ran, row, column = kept.to(device), row_of.to(device)[prompts.row], column_of.to(device)[prompts.row]
    return Stretches(prompts.input_ids[ran], prompts.mask[ran], row, column)


def sequence_tokens(policy: ItemIdGenerator, batch: Mapping[str, Tensor]) -> int:
    """See `GenerativePolicy.sequence_tokens`."""
    if not len(batch["target"]):
        return 0
    if policy.id_length > 1:
        return policy.prompt_tokens(pairs_as_prompts(batch)) + policy.fed_tokens(batch["target"])
    if policy.chat is None:
        return int((batch["sequence"] >= 0).sum()) + len(batch["sequence"])
    return int(_stretches(policy, batch).mask.sum())


def _stretches(policy: ItemIdGenerator, batch: Mapping[str, Tensor]) -> Stretches:
    return stretches(policy.encode(pairs_as_prompts(batch)), position_rules(decoder_of(policy.model)).switch)


def shared_states(policy: ItemIdGenerator, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The last hidden state of each prompt, float [B, D], and the tokens run: a prompt that another begins with is not.

    Args:
        policy: with ids of one token.
        batch: of single samples.
    """
    prompts = policy.encode(batch)
    tokens, mask, row, column = stretches(prompts, position_rules(decoder_of(policy.model)).switch)
    if len(tokens) == len(prompts.input_ids):
        return policy.run_encoded(prompts).states, int(mask.sum())
    width, lengths = mask.shape[1], mask.sum(dim=1)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places(mask)}
    if policy.chat is None:  # padded on the right, where no token sees it, as in `sequence_nll`
        spot = torch.arange(width, device=mask.device) + (width - lengths)[:, None]
        inside = spot < width
        inputs = {"input_ids": tokens.gather(1, spot.clamp(max=width - 1)).where(inside, policy.pad_token_id)}
        column = column - (width - lengths)[row]
    states = body_of(policy.model)(use_cache=False, **inputs).last_hidden_state
    return states.flatten(0, 1).index_select(0, row * width + column), int(mask.sum())


def sequence_nll(policy: ItemIdGenerator, batch: Mapping[str, Tensor], dropout: float) -> Tensor:
    """See `GenerativePolicy.sequence_nll`."""
    sequence, row, position, target = (batch[key] for key in ("sequence", "row", "position", "target"))
    if not len(target):
        return no_loss(policy)
    if policy.id_length > 1:
        logps, _, _ = policy.completion_logps(pairs_as_prompts(batch), target[:, None])
        return -logps.sum() / len(target)
    first_tokens, head = policy.trie.item_tokens[:, 0], head_of(policy.model)
    if policy.chat is None:
        tokens = torch.where(sequence >= 0, first_tokens[sequence.clamp(min=0)], policy.pad_token_id)
        tokens = nn.functional.pad(tokens, (1, 0), value=policy.bos_token_id)
        check_positions(policy.model, tokens.shape[1])
        _check_sequence(policy.model, tokens.shape[1])
        inputs = {"input_ids": tokens}
        column = position + 1
    else:
        tokens, mask, row, column = _stretches(policy, batch)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        inputs["position_ids"] = places(mask)
    with _embeddings_dropped(policy.model, dropout if policy.chat is None and policy.training else 0.0):
        states = body_of(policy.model)(use_cache=False, **inputs).last_hidden_state
    # The gradient of index_select adds up in a fixed order, that of indexing does not on several threads.
    states = states.flatten(0, 1).index_select(0, row * tokens.shape[1] + column)
    states = nn.functional.dropout(states, dropout, policy.training)
    return nn.functional.cross_entropy(head.logits(states, first_tokens), target, reduction="sum") / len(target)


def _check_sequence(model: Any, length: int) -> None:
    """Refuses sequences over a length at which positions change: each place in them is the end of a prompt."""
    rules = position_rules(decoder_of(model))
    longest = min((most for most in (rules.switch, rules.limit) if most is not None), default=length)
    if length > longest:
        raise InputError(
            f"training sequences have up to {length} tokens and the model changes its positions after {longest}: lower "
            "data.history_window"
        )


@contextmanager
def _embeddings_dropped(model: Any, probability: float) -> Iterator[None]:
    """Drops values of the embeddings of tokens inside, which a model gets as tokens: some look them up twice."""

    def drop(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        return nn.functional.dropout(embeddings, probability)

    hook = model.get_input_embeddings().register_forward_hook(drop) if probability else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
