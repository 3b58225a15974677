"""Sampling of groups of completions, and the frame in which it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirec_pl.errors import InputError


class Prompt(NamedTuple):
    """Prompts run through the model; neighbours with the same history were run once.

    Attributes:
        states: float [B, D], the last hidden state of each prompt.
        row: int64 [B], which of the U prompts that were run belongs to each sample.
        mask: int64 [U, T], which tokens are real.
        cache: keys and values of the U prompts; None for one-token ids.
    """

    states: Tensor
    row: Tensor
    mask: Tensor
    cache: Any


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


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every submodule's own mode is put back, also after an exception."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def filter_logps(logps: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Keeps the `top_k` most likely entries, then the smallest set with mass `top_p`, and renormalises.

    Args:
        logps: float [R, V], normalised.
        top_k: entries to keep; None or 0 keeps all.
        top_p: mass in (0, 1] to keep; None or 1.0 keeps all.

    Returns:
        float [R, V], normalised.
    """
    if top_k and top_k < logps.shape[-1]:
        threshold = logps.topk(top_k, dim=-1).values[:, -1:]
        logps = logps.masked_fill(logps < threshold, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, index = logps.softmax(dim=-1).sort(dim=-1, descending=True)
        drop = ordered.cumsum(dim=-1) - ordered >= top_p
        logps = logps.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), float("-inf"))
    return logps.log_softmax(dim=-1)


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """Samples with replacement by inversion: the first entry whose cumulative probability exceeds a uniform number.

    A row's draws depend on its own probabilities and numbers alone, never on the rest of the batch.

    Args:
        logps: float [R, V], log-probabilities.
        uniform: float64 [R, n], in [0, 1).

    Returns:
        int64 [R, n], positions in a row; entries of probability 0 are never drawn.

    Raises:
        InputError: if a probability is NaN.
    """
    mass = logps.double().exp().cumsum(dim=-1)
    total = mass[:, -1:]
    if not bool(total.isfinite().all()):
        raise InputError("the policy's probabilities are NaN: its weights have diverged, so lower the learning rate")
    below_total = torch.minimum(uniform * total, total * (1 - 1e-12))
    return torch.searchsorted(mass, below_total.contiguous(), right=True)
