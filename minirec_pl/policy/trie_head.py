"""The nodes of a catalogue's trie as candidates for the next token, and log-probabilities of whole items under it."""

from __future__ import annotations

import torch
from torch import Tensor

from minirec_pl.policy.language_models.causal_lm import Head
from minirec_pl.policy.language_models.sampling import CompletionStates, filter_logps
from minirec_pl.policy.trie import TokenTrie


class TrieHead:
    """Candidates are the children of a row's node that still lead to an allowed item.

    A row ends at its leaf, or as soon as a single item is left below its node.

    Args:
        head: of the model; only the rows of the candidates' tokens are multiplied.
        trie: of the catalogue.
        seen: int64 [B, S], items that may not be generated, padded with -1.
        temperature: divides the logits.
        top_k: keep the k most likely tokens at each step; None keeps all.
        top_p: keep the smallest set of tokens with this mass; None keeps all.
    """

    def __init__(
        self,
        head: Head,
        trie: TokenTrie,
        seen: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        self.head, self.trie, self.temperature, self.top_k, self.top_p = head, trie, temperature, top_k, top_p
        self.counts, self.sample, self.depth = (
            trie.available_below(seen),
            torch.arange(len(seen), device=seen.device),
            0,
        )
        self.low = torch.zeros(len(seen), dtype=torch.int64, device=seen.device)
        self.high = self.low + trie.n_items

    def logps(self, states: Tensor) -> Tensor:
        """Log-probabilities of the nodes at the next depth, float32 [R, n_children]."""
        counts = self.counts[self.sample]
        rows = child_logps(self.head, self.trie, states, self.depth, self.low, self.high, counts, self.temperature)
        return filter_logps(rows, self.top_k, self.top_p)

    def take(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenHead`."""
        tokens, lows, highs = self.trie.level(self.depth)
        self.low, self.high = lows[candidates], highs[candidates]
        self.depth += 1
        if self.depth == self.trie.depth:
            return tokens[candidates], torch.ones_like(candidates, dtype=torch.bool)
        return tokens[candidates], self.high - self.low == 1

    def select(self, source: Tensor) -> None:
        """See `TokenHead`."""
        self.low, self.high, self.sample = self.low[source], self.high[source], self.sample[source]


def child_logps(
    head: Head,
    trie: TokenTrie,
    states: Tensor,
    depth: int,
    low: Tensor,
    high: Tensor,
    counts: Tensor,
    temperature: float,
) -> Tensor:
    """Log-softmax over the allowed children of trie nodes, float32 [R, n_children]; the lowest finite value elsewhere.

    Args:
        head: of the model.
        trie: of the catalogue.
        states: float [R, D], which produce the token at `depth`.
        depth: level of the children.
        low: int64 [R], first sorted item below each node.
        high: int64 [R], one past the last sorted item below each node.
        counts: int64 [R, n_items + 1], from `TokenTrie.available_below`.
        temperature: divides the logits.
    """
    tokens, _, _ = trie.level(depth)
    logits = head.logits(states, tokens) / temperature
    allowed = trie.allowed_children(depth, low, high, counts)
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(dim=-1)


def item_logps(
    head: Head, trie: TokenTrie, states: CompletionStates, items: Tensor, seen: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens of items, differentiable in `states` and `head`.

    Args:
        head: of the model.
        trie: of the catalogue.
        states: of B prompts and G completions each.
        items: int64 [B, G], item index.
        seen: int64 [B, S], items that may not be generated, padded with -1.
        temperature: divides the logits.

    Returns:
        logps float32 [B, G, L] (0 where masked), mask bool [B, G, L], entropy float32 [B, G, L] in nats, without
        gradient.
    """
    group = items.shape[1]
    child = trie.child_of[items]
    counts = trie.available_below(seen)
    low = torch.zeros(len(seen), dtype=torch.int64, device=seen.device)
    root = child_logps(head, trie, states.prompt, 0, low, low + trie.n_items, counts, temperature)
    logps, entropies = [root.gather(1, child[:, :, 0])], [_entropy(root.detach())[:, None].expand(-1, group)]
    counts = counts.repeat_interleave(group, dim=0) if trie.depth > 1 else counts
    for depth in range(1, trie.depth):
        _, lows, highs = trie.level(depth - 1)
        # Elsewhere the token is certain: its log-probability and the entropy are 0.
        open_ = (trie.decided[items] > depth).flatten().nonzero().flatten()
        parent, taken = (child[:, :, column].flatten()[open_] for column in (depth - 1, depth))
        after = states.rest[:, :, depth - 1].flatten(0, 1).index_select(0, open_)
        rows = child_logps(head, trie, after, depth, lows[parent], highs[parent], counts[open_], temperature)
        for kind, some in ((logps, rows.gather(1, taken[:, None])[:, 0]), (entropies, _entropy(rows.detach()))):
            kind.append(some.new_zeros(items.numel()).index_copy(0, open_, some).view_as(items))
    mask = child >= 0
    values = (torch.stack(kind, dim=-1).masked_fill(~mask, 0.0) for kind in (logps, entropies))
    return next(values), mask, next(values)


def _entropy(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)
