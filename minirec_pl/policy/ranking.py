"""Scores of the whole catalogue by a policy that generates item ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirec_pl.policy.language_models.causal_lm import head_of
from minirec_pl.policy.language_models.decoding import decode_beams
from minirec_pl.policy.language_models.sampling import Prompt, evaluation_mode
from minirec_pl.policy.trie_head import TrieHead

if TYPE_CHECKING:
    from minirec_pl.policy.generative import GenerativePolicy

_LOGITS = 2**22  # of completions that are scored at a time
_CACHE_BYTES = 2**28  # of the keys and values of their prompts


def item_scores(policy: GenerativePolicy, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    """See `GenerativePolicy.item_logps`."""
    with evaluation_mode(policy):
        prompt, seen = policy.run_prompt(batch), batch["seen"]
        if policy.id_length == 1:
            scores = policy.root_logps(prompt.states, seen)[:, policy.trie.child_of[:, 0]]
        elif policy.evaluation_beams is not None:
            scores = _of_beams(policy, prompt, seen, min(policy.evaluation_beams, policy.trie.n_items))
        else:
            most = max(1, min(chunk, _most_completions(policy, prompt)) // len(seen))
            every = torch.arange(policy.trie.n_items, device=seen.device).expand(len(seen), -1)
            parts = []
            for items in torch.split(every, most, dim=1):
                states = policy.completion_states(prompt, items)
                parts.append(policy.head_logps(states, items, seen)[0].sum(dim=-1))
            scores = torch.cat(parts, dim=1)
        return scores.clamp(min=torch.finfo(torch.float32).min)


def _most_completions(policy: GenerativePolicy, prompt: Prompt) -> int:
    """Completions at a time that keep within the bounds of memory above."""
    layers: list[Any] = prompt.cache.layers
    cached: int = sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in layers)
    return max(1, min(_CACHE_BYTES // cached, _LOGITS // policy.trie.widest))


def _of_beams(policy: GenerativePolicy, prompt: Prompt, seen: Tensor, width: int) -> Tensor:
    n_items, lowest = policy.trie.n_items, torch.finfo(torch.float32).min
    rows = decode_beams(prompt, TrieHead(head_of(policy.model), policy.trie, seen), width, policy.id_length)
    found = policy.trie.items_of(rows.tokens.masked_fill(~rows.mask, -1)).view(-1, width)
    logps = rows.logps.sum(dim=1).float().view(-1, width)
    scores = torch.full((len(seen), n_items + 1), lowest, dtype=torch.float32, device=seen.device)
    return scores.scatter_(1, found.where(found >= 0, n_items), logps)[:, :n_items]
