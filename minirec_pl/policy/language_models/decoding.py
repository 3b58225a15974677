"""The decoding loops of every policy: take a token for each row, drop the rows that have ended, feed the rest."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minirec_pl.policy.language_models.kv_cache import decode_cache
from minirec_pl.policy.language_models.sampling import Prompt, check_probabilities, draw


class TokenHead(Protocol):
    """What may follow the tokens of a row, and how likely it is. It begins with one row for each sample."""

    def logps(self, states: Tensor) -> Tensor:
        """Log-probabilities, float [R, C], of the C candidates after `states` [R, D]; -inf or the lowest for none."""

    def take(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Appends candidates int64 [R]: their tokens int64 [R], and whether a row ends with it, bool [R]."""

    def select(self, source: Tensor) -> None:
        """Row i becomes what row `source[i]` was; there are as many rows as sources afterwards."""


class TokenRows(NamedTuple):
    """Decoded rows, G neighbouring ones for each sample.

    Attributes:
        tokens: int64 [B * G, L]; 0 where masked.
        logps: float [B * G, L], the log-probability of each token among its candidates; 0 where masked.
        mask: bool [B * G, L], which tokens exist; the one that ends a row does.
    """

    tokens: Tensor
    logps: Tensor
    mask: Tensor

    @classmethod
    def empty(cls, rows: int, length: int, logps: Tensor) -> TokenRows:
        """Rows without a token, with the dtype and device of `logps`."""
        size, device = (rows, length), logps.device
        return cls(
            torch.zeros(size, dtype=torch.int64, device=device),
            logps.new_zeros(size),
            torch.zeros(size, dtype=torch.bool, device=device),
        )


class Decoder:
    """Feeds one token a step to the rows in use, on a cache of their prompts."""

    def __init__(self, prompt: Prompt, group: int | Tensor, room: int) -> None:
        self.body = prompt.body
        self.row = prompt.row.repeat_interleave(group)  # of all rows of the cache, in use or not
        self.cache = decode_cache(prompt.cache, self.row, room)
        self.layers: list[Any] = self.cache.layers
        mask = prompt.mask.index_select(0, self.row)
        self.mask = torch.nn.functional.pad(mask, (0, room), value=1)
        self.position = mask.sum(dim=1)
        self.prompt_length = self.length = mask.shape[1]

    def step(self, tokens: Tensor) -> Tensor:
        """Last hidden states, float [R, D], after tokens int64 [R]."""
        self.length += 1
        states: Tensor = self.body(
            input_ids=tokens[:, None],
            attention_mask=self.mask[:, : self.length],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.position = self.position + 1
        return states[:, -1]

    def select(self, source: Tensor) -> None:
        """Row i becomes what row `source[i]` was; a row that keeps its prompt copies what follows the prompt only."""
        target = torch.arange(len(source), device=source.device)
        same_prompt = self.row[source] == self.row[: len(source)]
        copies = ((0, ~same_prompt), (self.prompt_length, same_prompt & (source != target)))
        moves = [(target[moved], source[moved], start) for start, moved in copies]
        for layer in self.layers:
            layer.select(len(source), moves)
        self.row[: len(source)] = self.row[source]
        self.mask, self.position = self.mask[source], self.position[source]


@torch.no_grad()
def decode(
    prompt: Prompt, head: TokenHead, group: int, length: int, uniform: Tensor | None, sizes: Tensor | None = None
) -> TokenRows:
    """Samples `group` rows for each sample, or takes the most likely token at each step.

    Args:
        prompt: of B samples, run in evaluation mode.
        head: fresh, with one row for each sample.
        group: G.
        length: L, tokens at most.
        uniform: float64 [B, G, L] in [0, 1), one number for each token drawn; None takes the most likely one.
        sizes: int64 [B], how many of its G rows each sample gets; None for all. The others have no token.

    Raises:
        InputError: if a probability is NaN.
    """
    logps = head.logps(prompt.states)
    pick = _most_likely(logps).expand(-1, group) if uniform is None else draw(logps, uniform[:, :, 0])
    rows = torch.arange(pick.numel(), device=logps.device)
    if sizes is not None:
        rows = rows[(torch.arange(group, device=logps.device) < sizes[:, None]).flatten()]
    chosen = logps.gather(1, pick).flatten()[rows]
    head.select(rows // group)
    tokens, ended = head.take(pick.flatten()[rows])
    numbers = None if uniform is None else uniform.flatten(0, 1)
    output = TokenRows.empty(pick.numel(), length, logps)
    decoder: Decoder | None = None
    for step in range(length):
        output.tokens[rows, step], output.logps[rows, step], output.mask[rows, step] = tokens, chosen, True
        if step + 1 == length or bool(ended.all()):
            break
        decoder = decoder or Decoder(prompt, group if sizes is None else sizes, length - 1)
        if bool(ended.any()):
            source = _fill_holes(ended)
            decoder.select(source)
            head.select(source)
            rows, tokens = rows[source], tokens[source]
        logps = head.logps(decoder.step(tokens))
        pick = _most_likely(logps) if numbers is None else draw(logps, numbers[rows, step + 1, None])
        chosen = logps.gather(1, pick).flatten()
        tokens, ended = head.take(pick.flatten())
    return output


def _most_likely(logps: Tensor) -> Tensor:
    best, pick = logps.max(dim=-1, keepdim=True)
    check_probabilities(best)
    return pick


def _fill_holes(ended: Tensor) -> Tensor:
    """Rows from the end in the places of those that ended, so that few are copied: int64 [rows left]."""
    n_left = int((~ended).sum())
    source = torch.arange(n_left, device=ended.device)
    source[ended[:n_left]] = n_left + (~ended[n_left:]).nonzero().flatten()
    return source


@torch.no_grad()
def decode_beams(prompt: Prompt, head: TokenHead, group: int, length: int) -> TokenRows:
    """The rows that a beam search of width `group` ends with, the most likely first.

    A row that has ended keeps its place as long as no others are more likely; there is no length penalty. Where fewer
    than `group` rows exist, the mask of the missing ones is empty.

    Args:
        prompt: as in `decode`.
        head: as in `decode`.
        group: G, the width of the beam.
        length: L, tokens at most.

    Raises:
        InputError: if a probability is NaN.
    """
    n_samples, device = len(prompt.states), prompt.states.device
    first = torch.arange(n_samples, device=device)[:, None] * group
    beams = TokenRows.empty(n_samples * group, length, head_logps := head.logps(prompt.states))
    total = head_logps.new_full((n_samples * group,), -torch.inf)
    ended = torch.zeros_like(total, dtype=torch.bool)
    place = first.flatten()  # of each row in use among the beams
    total[place] = 0.0
    decoder: Decoder | None = None
    for step in range(length):
        check_probabilities(head_logps.amax(dim=-1))
        n_candidates = head_logps.shape[1]
        scores = total.new_full((len(total), n_candidates), -torch.inf)
        scores[place] = total[place, None] + head_logps
        scores[ended, 0] = total[ended]
        best, index = scores.view(n_samples, -1).topk(group, dim=-1)
        parent, column = (first + index // n_candidates).flatten(), (index % n_candidates).flatten()
        row_of = torch.zeros_like(parent)
        row_of[place] = torch.arange(len(place), device=device)
        beams, total, ended = TokenRows(*(part[parent] for part in beams)), best.flatten(), ended[parent]
        place = ((total > torch.finfo(total.dtype).min) & ~ended).nonzero().flatten()
        source = row_of[parent[place]]
        head.select(source)
        tokens, ended[place] = head.take(column[place])
        chosen = head_logps[source, column[place]]
        beams.tokens[place, step], beams.logps[place, step], beams.mask[place, step] = tokens, chosen, True
        open_ = (~ended[place]).nonzero().flatten()
        if step + 1 == length or not len(open_):
            break
        head.select(open_)
        place = place[open_]
        if decoder is None:
            decoder = Decoder(prompt, group, length - 1)
            decoder.select(place)
        else:
            decoder.select(source[open_])
        head_logps = head.logps(decoder.step(tokens[open_]))
    missing = (total <= torch.finfo(total.dtype).min)[:, None]
    return TokenRows(*(part.masked_fill(missing, 0) for part in beams))
