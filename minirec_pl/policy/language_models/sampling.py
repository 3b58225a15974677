"""Sampling of groups of completions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minirec_pl.utils.errors import InputError

_LONG_ROW = 4096  # entries; longer rows are drawn from in two steps
_BLOCK = 256


class Prompt(NamedTuple):
    """Prompts run through the model; neighbours with the same history were run once.

    Attributes:
        states: float [B, D], the last hidden state of each prompt.
        row: int64 [B], which of the U prompts that were run belongs to each sample.
        mask: int64 [U, T], which tokens are real.
        cache: keys and values of the U prompts; None where no completions follow.
        body: the transformer that ran them, and runs the completions, from `causal_lm.body_of`.
    """

    states: Tensor
    row: Tensor
    mask: Tensor
    cache: Any
    body: Any


class CompletionStates(NamedTuple):
    """Hidden states from which the head produces the tokens of B x G completions.

    Attributes:
        prompt: float [B, D], the last hidden state of each prompt, which produces every first token.
        rest: float [B, G, L - 1, D], the states that produce the later tokens (L - 1 = 0 for one-token ids).
    """

    prompt: Tensor
    rest: Tensor


class Rollouts(NamedTuple):
    """G sampled items for each of B prompts.

    Attributes:
        items: int64 [B, G], item index.
        logps: float32 [B, G, L], log-probabilities with which the id tokens were drawn, after temperature, top_k and
            top_p; 0 where masked.
        mask: bool [B, G, L], which id tokens exist.
    """

    items: Tensor
    logps: Tensor
    mask: Tensor


def rollout_generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for rollouts, seeded by all the words together.

    Args:
        words: at least 0 each; for example seed, epoch, step and rank.
        device: where the numbers are drawn.

    Example:
        >>> a, b = (torch.rand(2, generator=rollout_generator(42, 0, 7, rank)) for rank in (0, 1))
        >>> bool((a != b).all())
        True
    """
    state = np.random.SeedSequence([len(words), *words]).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(state[0]) & (2**63 - 1))


def filter_logps(logps: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Keeps the `top_k` most likely entries, then the smallest set with mass `top_p`, and renormalises.

    Args:
        logps: float [R, V], normalised.
        top_k: entries to keep; None or 0 keeps all.
        top_p: mass in (0, 1] to keep; None or 1.0 keeps all.

    Returns:
        float [R, V], normalised.
    """
    for warper in warpers(top_k=top_k, top_p=top_p):
        logps = warper(None, logps)
    return logps.log_softmax(dim=-1)


def warpers(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> list[Any]:
    """The logits processors of transformers for these options, in the order of its `generate`."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made: list[Any] = []
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    return made


def check_probabilities(values: Tensor) -> None:
    """Refuses the probabilities of a model whose weights have diverged.

    Raises:
        InputError: if a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise InputError("the policy's probabilities are NaN: its weights have diverged, so lower the learning rate")


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """Samples with replacement by inversion: the first entry whose cumulative probability exceeds a uniform number.

    A row's draws depend on its own probabilities and numbers alone, never on the rest of the batch. A long row is
    summed in blocks: the number finds its block first, then its place there.

    Args:
        logps: float [R, V], log-probabilities.
        uniform: float64 [R, n], in [0, 1).

    Returns:
        int64 [R, n], positions in a row; entries of probability 0 are never drawn.

    Raises:
        InputError: if a probability is NaN.
    """
    if logps.shape[-1] <= _LONG_ROW:
        return _invert(logps.double().exp(), uniform)[0]
    padding = -logps.shape[-1] % _BLOCK
    mass = logps.exp()
    blocks = (nn.functional.pad(mass, (0, padding)) if padding else mass).view(len(logps), -1, _BLOCK)
    block, rest = _invert(blocks.sum(dim=-1).double(), uniform)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).double()
    place, _ = _invert(inside.flatten(0, 1), rest.flatten()[:, None])
    return block * _BLOCK + place.view_as(block)


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Entries int64 [R, n] drawn in proportion to `mass` [R, V], and how far into its entry each number fell [R, n]."""
    upper = mass.cumsum(dim=-1)
    total = upper[:, -1:]
    check_probabilities(total)
    point = torch.minimum(uniform * total, total * (1 - 1e-12)).contiguous()
    entry = torch.searchsorted(upper, point, right=True)
    width = mass.gather(1, entry)
    return entry, ((point - upper.gather(1, entry) + width) / width).clamp(0.0, 1.0)
