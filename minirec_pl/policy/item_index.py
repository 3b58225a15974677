"""Items encoded by a language model from their texts: unit vectors, refreshed bit by bit, compared with users."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirec_pl.policy.interface import Ranking
from minirec_pl.policy.language_models.causal_lm import body_of, by_length, pad_left, run_prompt
from minirec_pl.policy.language_models.exact_buffers import ExactBuffers
from minirec_pl.policy.reasoning import unit

_TOKENS = 8192  # through the model at a time
_SCORES = 2**24  # scores that exist at a time
_VALUES = 2**24  # values of item vectors that are widened at a time


class ItemIndex(ExactBuffers):
    """A unit vector for each item, made by the policy's own language model.

    The vectors are part of checkpoints, so that a resumed run has the same ones.

    Args:
        tokens: of each item, each at least one; the vector is the last hidden state.
        width: D.
        dtype: dtype of the vectors.
        pad: token that pads.
    """

    vectors: Tensor
    step: Tensor
    encoded_with: Tensor

    def __init__(self, tokens: Sequence[list[int]], width: int, dtype: torch.dtype, pad: int) -> None:
        super().__init__()
        self.tokens = list(tokens)
        self.pad = pad
        self.lengths = torch.tensor([len(item) for item in self.tokens])
        count = len(self.tokens)
        self.register_buffer("vectors", torch.zeros(count, width, dtype=dtype))
        self.register_buffer("step", torch.full((count,), -1))
        self.register_buffer("encoded_with", torch.full((count,), torch.nan, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the items' tokens."""
        return hashlib.sha256("\n".join(" ".join(map(str, item)) for item in self.tokens).encode()).hexdigest()

    def encode(self, model: Any, items: Tensor, body: Callable[..., Any] | None = None) -> Tensor:
        """Vectors of some items with gradient, in batches of similar length.

        Args:
            model: a causal language model of transformers, also inside peft.
            items: int64 [n].
            body: of the model, from `body_of`, where there is one already.

        Returns:
            [n, D], unit vectors in float32 or the wider dtype of the model.
        """
        if not len(items):
            return unit(self.vectors[:0].to(next(model.parameters()).dtype))
        body, device = body or body_of(model), self.vectors.device
        lengths = self.lengths[items.cpu()]
        return unit(by_length(lengths, lambda rows: self._states(body, items[rows.to(device)]), _TOKENS))

    def _states(self, body: Any, items: Tensor) -> Tensor:
        ids, mask = pad_left([self.tokens[item] for item in items.tolist()], self.pad, items.device)
        return run_prompt(body, ids, mask, keep_cache=False).states

    def due(self, weights: float, step: int | None, every: int, budget: int | None) -> Tensor:
        """Which items to encode now.

        Items never encoded are always due. Apart from them, without a `step` all whose vector is not of the present
        weights are; with one, these are due `every` steps, stalest first, among equals the shortest text first.

        Args:
            weights: a number that stands for the present weights.
            step: optimizer steps so far, or None.
            every: optimizer steps from one refresh to the next.
            budget: tokens of a refresh; None for all.

        Returns:
            int64 [n].
        """
        last, stale = self.step.cpu(), (self.encoded_with != weights).cpu()
        new = last < 0
        if step is not None:
            if step - int(last.max()) < every:
                stale = torch.zeros_like(stale)
            elif budget is not None:
                order = np.lexsort((self.lengths.numpy(), last.numpy()))
                order = order[(stale & ~new).numpy()[order]]
                spent = np.cumsum(self.lengths.numpy()[order])
                chosen = torch.from_numpy(order[: max(1, int(np.searchsorted(spent, budget, side="right")))])
                stale = torch.zeros_like(stale).index_fill(0, chosen, True)
        return (stale | new).nonzero().flatten()

    @torch.no_grad()
    def refresh(self, model: Any, items: Tensor, weights: float, step: int | None) -> int:
        """Encodes items and keeps their vectors.

        Args:
            model: in evaluation mode.
            items: int64 [n].
            weights: see `due`.
            step: optimizer steps so far; None for that of the last refresh.

        Returns:
            Tokens that went through the model.
        """
        if not len(items):
            return 0
        when = max(0, int(self.step.max())) if step is None else step
        items = items.cpu()
        items = items[torch.argsort(self.lengths[items], stable=True)]
        for portion in torch.split(items.to(self.vectors.device), 1024):
            self.vectors[portion] = self.encode(model, portion).to(self.vectors.dtype)
        # A resumed run repeats what was interrupted before this.
        items = items.to(self.vectors.device)
        self.step[items], self.encoded_with[items] = when, weights
        return int(self.lengths[items.cpu()].sum())

    def scores(self, states: Tensor, temperature: float) -> Tensor:
        """Cosines over temperature, float32 [R, n_items], of hidden states [R, D] and all items, without gradient."""
        users = unit(states.detach()).float()
        made = users.new_empty(len(users), len(self))
        for part in torch.split(torch.arange(len(self)), max(1, _VALUES // self.vectors.shape[1])):
            columns = slice(int(part[0]), int(part[-1]) + 1)
            torch.mm(users, self.vectors[columns].float().T, out=made[:, columns])
        return made.div_(temperature)

    def blocks(self, rows: int) -> Iterator[slice]:
        """Neighbouring rows, at least one slice, few enough that their scores of all items stay below 64 MiB."""
        size = max(1, _SCORES // len(self))
        for start in range(0, max(1, rows), size):
            yield slice(start, min(rows, start + size))

    def log_softmax(self, states: Tensor, seen: Tensor, temperature: float) -> Tensor:
        """Log-probabilities float32 [R, n_items] over the items the users have not seen, the lowest value for those.

        Args:
            states: float [R, D].
            seen: int64 [R, S], padded with -1.
            temperature: divides the cosines.
        """
        made = torch.empty(len(states), len(self), dtype=torch.float32, device=states.device)
        for rows in self.blocks(len(states)):
            made[rows] = self._open(self.scores(states[rows], temperature), seen[rows]).log_softmax(dim=1)
        return made.clamp_(min=torch.finfo(torch.float32).min)

    def rank(self, states: Tensor, target: Tensor, seen: Tensor, temperature: float) -> Ranking:
        """Ranks the whole catalogue for each user, some users at a time.

        Args:
            states: float [R, D].
            target: int64 [R].
            seen: int64 [R, S], padded with -1.
            temperature: divides the cosines.
        """
        parts = []
        for rows in self.blocks(len(states)):
            scores = self._open(self.scores(states[rows], temperature), seen[rows])
            column = target[rows, None]
            wanted = scores.gather(1, column)
            ahead = (scores > wanted).sum(dim=1)
            ahead += ((scores == wanted) & (torch.arange(len(self), device=scores.device) < column)).sum(dim=1)
            there = wanted[:, 0] > -torch.inf
            probability = (wanted[:, 0] - scores.logsumexp(dim=1)).exp()
            parts.append(Ranking((ahead + 1) * there, probability, scores.argmax(dim=1)))
        return Ranking(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _open(self, scores: Tensor, seen: Tensor) -> Tensor:
        row, column = (seen >= 0).nonzero(as_tuple=True)
        return scores.index_put_((row, seen[row, column]), scores.new_tensor(-torch.inf))


def draw_negatives(count: int, target: Tensor, sample_id: Tensor, words: Sequence[int], size: int) -> Tensor:
    """Items other than the target, without repeats, which depend on the words and the row's own sample_id alone.

    Args:
        count: of items in the catalogue.
        target: int64 [B].
        sample_id: int64 [B].
        words: a seed and whatever else; at least 0 each.
        size: how many; all the others where the catalogue has fewer.

    Returns:
        int64 [B, K].

    Example:
        >>> sorted(draw_negatives(3, torch.tensor([1]), torch.tensor([7]), [0], 5)[0].tolist())
        [0, 2]
    """
    size = min(size, count - 1)
    rows = [
        np.random.default_rng([*words, sample]).choice(count - 1, size, replace=False) for sample in sample_id.tolist()
    ]
    drawn = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), size)).to(target.device)
    return drawn + (drawn >= target[:, None])
