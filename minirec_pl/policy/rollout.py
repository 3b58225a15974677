"""Sampling of groups of completions, and the frame in which it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rollouts(NamedTuple):
    """G sampled items for each of B prompts.

    Attributes:
        items: int64 [B, G], item index.
        logps: float32 [B, G, L], log-probabilities of the id tokens under the constrained policy; 0 where masked.
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
