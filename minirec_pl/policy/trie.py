"""A catalogue as a token trie, held as one lexicographically sorted table.

A node at depth d is a range [low, high) of the sorted items that share their first d tokens, so "is anything left below
this child" is one difference of a cumulative count, for every row of a batch at once and for ids of any length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minirec_pl.policy.language_models.causal_lm import Head
from minirec_pl.policy.language_models.sampling import CompletionStates, filter_logps
from minirec_pl.utils.errors import InputError


class TokenTrie(nn.Module):
    """The ids of a catalogue, ready for constrained decoding.

    Args:
        item_tokens: int64 [n_items, L], the tokens of each item, right-padded with -1. No id may be a prefix of
            another: end ids of unequal length with a closing token.

    Attributes:
        decided: int64 [n_items], how many tokens it takes to tell an item from all others. Those that follow are
            certain, so that no hidden state is needed for them.

    Raises:
        InputError: if an id is empty or has a gap, or two items share an id or one id is a prefix of another.
    """

    item_tokens: Tensor
    order: Tensor
    rank: Tensor
    child_of: Tensor
    decided: Tensor

    def __init__(self, item_tokens: Tensor) -> None:
        super().__init__()
        if item_tokens.ndim != 2 or item_tokens.shape[0] == 0 or item_tokens.shape[1] == 0:
            raise InputError("the catalogue is empty: the trie needs at least one item with at least one token")
        tokens = item_tokens.to(torch.int64).cpu()
        n_items, self.depth = tokens.shape
        missing = tokens < 0
        if bool(missing[:, 0].any()):
            raise InputError(f"item index {int(missing[:, 0].nonzero()[0])} has no token: every item needs an id")
        gap = (missing[:, :-1] & ~missing[:, 1:]).any(dim=1)
        if bool(gap.any()):
            raise InputError(f"the id of item index {int(gap.nonzero()[0])} has a gap: pad with -1 on the right only")
        tokens = tokens.masked_fill(missing, -1)
        order = torch.arange(n_items)
        for column in range(self.depth - 1, -1, -1):
            order = order[torch.argsort(tokens[order, column], stable=True)]
        ordered = tokens[order]
        self.register_buffer("item_tokens", tokens, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("rank", torch.argsort(order), persistent=False)
        self._check_prefix_free(ordered, order)
        child_of, decided = torch.full((n_items, self.depth), -1), torch.full((n_items,), self.depth)
        starts = torch.zeros(n_items, dtype=torch.bool)
        starts[0] = True
        for column in range(self.depth):
            starts[1:] |= ordered[1:, column] != ordered[:-1, column]
            alive = ordered[:, column] >= 0
            first = (starts & alive).nonzero().flatten()
            group = torch.cumsum(starts & alive, 0) - 1
            size = torch.bincount(group[alive], minlength=len(first))
            child_of[order[alive], column] = group[alive]
            alone = order[alive][size[group[alive]] == 1]
            decided[alone] = decided[alone].clamp(max=column + 1)
            self.register_buffer(f"token_{column}", ordered[first, column], persistent=False)
            self.register_buffer(f"low_{column}", first, persistent=False)
            self.register_buffer(f"high_{column}", first + size, persistent=False)
        self.register_buffer("child_of", child_of, persistent=False)
        self.register_buffer("decided", decided, persistent=False)

    @staticmethod
    def _check_prefix_free(ordered: Tensor, order: Tensor) -> None:
        first, second = ordered[:-1], ordered[1:]
        clash = ((first == second) | (first < 0)).all(dim=1).nonzero().flatten()
        if len(clash):
            a, b = int(order[clash[0]]), int(order[clash[0] + 1])
            raise InputError(
                f"items with index {a} and {b} have ids of which one begins with the other; ids must differ"
            )

    @property
    def n_items(self) -> int:
        """Number of items in the catalogue."""
        return int(self.item_tokens.shape[0])

    @property
    def widest(self) -> int:
        """Most nodes at one depth."""
        return max(len(self.level(depth)[0]) for depth in range(self.depth))

    def level(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Children at one depth: token, low and high of each, int64 [n_children]."""
        return getattr(self, f"token_{depth}"), getattr(self, f"low_{depth}"), getattr(self, f"high_{depth}")

    def items_of(self, tokens: Tensor) -> Tensor:
        """The items with these ids, or whose ids alone begin so.

        Args:
            tokens: int64 [R, L], padded with -1 on the right.

        Returns:
            int64 [R], item index; -1 where there is no such item.
        """
        node = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        item, base = torch.full_like(node, -1), int(self.item_tokens.max()) + 1
        for depth in range(self.depth):
            token, low, _ = self.level(depth)
            parent = self.child_of[self.order[low], depth - 1] if depth else torch.zeros_like(low)
            keys = parent * base + token
            place = torch.searchsorted(keys, node * base + tokens[:, depth]).clamp(max=len(keys) - 1)
            real = tokens[:, depth] >= 0
            node, item = torch.where(real, place, node), torch.where(real, self.order[low[place]], item)
        length = (tokens >= 0).sum(dim=1)
        found = ((self.item_tokens[item] == tokens) | (tokens < 0)).all(dim=1) & (length >= self.decided[item])
        return torch.where(found, item, -1)

    def available_below(self, seen: Tensor) -> Tensor:
        """Cumulative count of items still allowed, in sorted order.

        Args:
            seen: int64 [B, S], items that may not be generated, padded with -1.

        Returns:
            int64 [B, n_items + 1]; the count below a range is the difference of two entries.

        Raises:
            InputError: if a row has every item of the catalogue masked.
        """
        allowed = torch.ones(seen.shape[0], self.n_items + 1, dtype=torch.int64, device=seen.device)
        slot = torch.where(seen >= 0, self.rank[seen.clamp(min=0)] + 1, 0)
        allowed.scatter_(1, slot, 0)
        allowed[:, 0] = 0
        counts = allowed.cumsum(dim=1)
        if bool((counts[:, -1] == 0).any()):
            row = int((counts[:, -1] == 0).nonzero()[0])
            raise InputError(f"row {row} of the batch has seen the whole catalogue: nothing is left to recommend")
        return counts

    def allowed_children(self, depth: int, low: Tensor, high: Tensor, counts: Tensor) -> Tensor:
        """Which children of the nodes [low, high) still lead to an allowed item.

        Args:
            depth: level of the children.
            low: int64 [R], first sorted item below each node.
            high: int64 [R], one past the last sorted item below each node.
            counts: int64 [R, n_items + 1], from `available_below`.

        Returns:
            bool [R, n_children].
        """
        _, child_low, child_high = self.level(depth)
        inside = (child_low >= low[:, None]) & (child_high <= high[:, None])
        return inside & (counts[:, child_high] > counts[:, child_low])


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
