"""Gradient signals of a softmax head in closed form: pure tensor functions.

For one softmax with logits z_m = (w_m . h + b_m) / tau, p = softmax(z), target t and y its one-hot vector:

    a   = d log p_t / dh    = W^T (y - p) / tau
    C a = -(d2 log p_t / dh2) a = (sum_m p_m w_m (w_m . a) - w_mean (w_mean . a)) / tau^2,  w_mean = sum_m p_m w_m

so that no graph and no second backward pass are needed. Paper: MiniRec (arXiv 2602.04278).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.errors import InputError

GradientKind = Literal["first", "hvp", "trajectory"]
GradientSpace = Literal["answer", "lora"]

_OWN_VECTORS = 2**21  # values of item vectors at a time, which stay in a processor's cache between the four products
_LOGITS = 2**24  # logits at a time where all rows share their vectors


class HeadStep(NamedTuple):
    """One softmax choice of each of B samples, on the way to its target.

    Attributes:
        hidden: float [B, D], the states that produce the choice.
        vectors: what they are compared with: float [V, D] shared by all rows, or [B, M, D], each row's own.
        target: int64 [B], position of the target among the vectors; -1 where a sample has no such step.
        allowed: bool [B, V] or [B, M], the vectors in the softmax; None for all. A target outside has
            the probability 0 and no signal.
        bias: float [V], added to the dot products; None for none.
        temperature: divides the logits.
    """

    hidden: Tensor
    vectors: Tensor
    target: Tensor
    allowed: Tensor | None = None
    bias: Tensor | None = None
    temperature: float = 1.0


def head_gradient(
    hidden: Tensor, item_vectors: Tensor, target: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """First-order gradient of each sample at the state that its softmax head reads.

    g = dl/dh of l = -p / stop_gradient(p), p the softmax probability of the target: g = -d log p / dh.

    Args:
        hidden: float [B, D]. For a head on cosines give unit states and unit vectors: g is then at the unit state.
        item_vectors: float [V, D] shared by all samples (a catalogue), or [B, M, D] (target and negatives of each).
        target: int64 [B], the target's position among the vectors.
        temperature: divides the dot products.
        allowed: bool [B, V] or [B, M], the vectors in the softmax; None for all. A target outside has the signal 0.

    Returns:
        [B, D], float64 for float64 states and float32 otherwise, detached.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.
    """
    return -_terms(HeadStep(hidden, item_vectors, target, allowed, None, temperature), second=False)[1]


def head_hvp(
    hidden: Tensor, item_vectors: Tensor, target: Tensor, *, temperature: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """Hessian-vector product of each sample at the state that its softmax head reads, as MiniRec's authors publish it.

    u = d(g . g)/dh = 2 H g with g = dl/dh, l = -p / stop_gradient(p), p the softmax probability of the target. With
    a = d log p / dh it is 2 (|a|^2 a - C a), four products with the item vectors (see the module's head).

    Args:
        hidden: float [B, D]. For a head on cosines give unit states and unit vectors: u is then at the unit state.
        item_vectors: float [V, D] shared by all samples (a catalogue), or [B, M, D] (target and negatives of each).
        target: int64 [B], the target's position among the vectors.
        temperature: divides the dot products.
        allowed: bool [B, V] or [B, M], the vectors in the softmax; None for all. A target outside has the signal 0.

    Returns:
        [B, D], float64 for float64 states and float32 otherwise, detached.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.

    Example:
        >>> head_hvp(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0])).shape
        torch.Size([1, 2])
    """
    return head_signal([HeadStep(hidden, item_vectors, target, allowed, None, temperature)], "hvp")[0]


def head_signal(steps: Sequence[HeadStep], kind: Literal["first", "hvp"]) -> tuple[Tensor, Tensor]:
    """Gradient signal of each sample at the states that produce its target, one or several tokens long.

    With p the probability of the whole target, the product of its steps, and h_t the state of step t:

    * `first`: u = sum_t -dp/dh_t, the expected group advantage gradient of a hit reward before scaling.
    * `hvp`: u = sum_t d(g . g)/dh_t, g all the dl/dh_t of l = -p / stop_gradient(p), the published signal (2 H g).

    Args:
        steps: at least one, of the same samples.
        kind: which signal.

    Returns:
        (u [B, D], log p [B]), float64 for float64 states and float32 otherwise, detached.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.
    """
    terms = [_terms(step, second=kind == "hvp") for step in steps]
    logp = torch.stack([logp for logp, _, _ in terms]).sum(dim=0)
    slope = torch.stack([slope for _, slope, _ in terms])
    if kind == "first":
        return -logp.exp()[:, None] * slope.sum(dim=0), logp
    bend = torch.stack([bend for _, _, bend in terms]).sum(dim=0)
    signal = 2 * (slope.square().sum(dim=(0, 2))[:, None] * slope.sum(dim=0) - bend)
    return signal.masked_fill(logp.isneginf()[:, None], 0.0), logp


def head_alignment(steps: Sequence[HeadStep], rows: Sequence[Tensor], displacement: Tensor) -> Tensor:
    """Agreement of each sample's update of the head with the way the head has gone.

    a_i = cos(-dl_i/dW, W_now - W_start), l_i = -log p_i, over the rows of W that any step can choose. The gradient is
    a sum of outer products, dl_i/dW = sum_t (p_t - y_t) h_t^T / tau, which is never built: its product with the
    displacement takes one matrix product a step, its norm a Gram matrix over the steps.

    Args:
        steps: of the same samples, with shared vectors.
        rows: for each step int64 [V], the rows of W that its vectors are.
        displacement: float [vocabulary, D], W_now - W_start.

    Returns:
        float [B] in [-1, 1]; 0 where the gradient or the displacement is 0.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.
    """
    used = torch.unique(torch.cat(list(rows)))
    residuals, states, products, logps = [], [], [], []
    with _exact(displacement.device):
        for step, row in zip(steps, rows, strict=True):
            _check(step)
            soft = _softmax(step)
            moved = soft.hidden @ displacement.index_select(0, row).to(soft.hidden.dtype).T
            products.append((soft.residual * moved).sum(dim=1) / step.temperature)
            wide = moved.new_zeros(len(moved), len(used))
            residuals.append(wide.index_add_(1, torch.searchsorted(used, row), soft.residual))
            states.append(soft.hidden / step.temperature)
            logps.append(soft.logp)
        q, h = torch.stack(residuals, dim=1), torch.stack(states, dim=1)
        norm = (q @ q.mT * (h @ h.mT)).sum(dim=(1, 2)).clamp_min(0).sqrt()
        length = torch.linalg.vector_norm(displacement[used].to(norm.dtype))
        cosine = safe_cosine(torch.stack(products).sum(dim=0), norm * length)
        return cosine.masked_fill(torch.stack(logps).sum(dim=0).isneginf(), 0.0)


def safe_cosine(product: Tensor, norm: Tensor) -> Tensor:
    """Product / norm in [-1, 1]; 0 where the norm is 0."""
    return torch.where(norm > 0, product / norm.where(norm > 0, torch.ones_like(norm)), 0.0).clamp(-1, 1)


class _Softmax(NamedTuple):
    """float32 or float64: hidden [B, D], vectors, p [B, M], y - p [B, M] (0 without a target) and log p [B]."""

    hidden: Tensor
    vectors: Tensor
    p: Tensor
    residual: Tensor
    logp: Tensor


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _dtype(step: HeadStep) -> torch.dtype:
    return torch.float64 if step.hidden.dtype == torch.float64 else torch.float32


def _softmax(step: HeadStep) -> _Softmax:
    dtype = _dtype(step)
    hidden, vectors = step.hidden.to(dtype), step.vectors.to(dtype)
    logits = _dots(hidden, vectors)
    if step.bias is not None:
        logits = logits + step.bias.to(dtype)
    logits = logits / step.temperature
    there, target = step.target >= 0, step.target.clamp(min=0)[:, None]
    possible = there
    if step.allowed is not None:
        logits = logits.masked_fill(~step.allowed, torch.finfo(dtype).min)
        possible = there & step.allowed.gather(1, target)[:, 0]
    logps = logits.log_softmax(dim=1)
    p = logps.exp()
    residual = (-p).scatter_add(1, target, torch.ones_like(target, dtype=dtype)) * possible[:, None]
    logp = logps.gather(1, target)[:, 0].masked_fill(~possible, -torch.inf).masked_fill(~there, 0.0)
    return _Softmax(hidden, vectors, p, residual, logp)


def _dots(directions: Tensor, vectors: Tensor) -> Tensor:
    """Dot products [B, M] of directions [B, D] with the vectors."""
    return directions @ vectors.T if vectors.ndim == 2 else torch.bmm(directions[:, None], vectors.mT)[:, 0]


def _sums(weights: Tensor, vectors: Tensor) -> Tensor:
    """Sums [B, D] of the vectors with weights [B, M]."""
    return weights @ vectors if vectors.ndim == 2 else torch.bmm(weights[:, None], vectors)[:, 0]


def _terms(step: HeadStep, second: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log p [B], a [B, D] and, if `second`, C a [B, D] (else empty), rows in portions that bound the memory."""
    _check(step)
    shared = step.vectors.ndim == 2
    portion = max(1, _LOGITS // len(step.vectors) if shared else _OWN_VECTORS // step.vectors[0].numel())
    every = step.vectors.to(_dtype(step)) if shared else step.vectors
    parts = []
    with _exact(step.hidden.device):
        for start in range(0, len(step.hidden), portion):
            some = slice(start, start + portion)
            soft = _softmax(
                step._replace(
                    hidden=step.hidden[some],
                    vectors=every if shared else every[some],
                    target=step.target[some],
                    allowed=None if step.allowed is None else step.allowed[some],
                )
            )
            slope = _sums(soft.residual, soft.vectors) / step.temperature
            bend = slope[:, :0]
            if second:
                turn = _dots(slope, soft.vectors) / step.temperature
                turn = soft.p * (turn - (soft.p * turn).sum(dim=1, keepdim=True))
                bend = _sums(turn, soft.vectors) / step.temperature
            parts.append((soft.logp, slope, bend))
    logp, slope, bend = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp, slope, bend


def _check(step: HeadStep) -> None:
    hidden, vectors, target, allowed = step.hidden, step.vectors, step.target, step.allowed
    own = vectors.ndim == 3 and len(vectors) == len(hidden)
    if hidden.ndim != 2 or not len(hidden) or not (own or vectors.ndim == 2) or vectors.shape[-1] != hidden.shape[-1]:
        raise InputError(
            f"hidden states {list(hidden.shape)} and item vectors {list(vectors.shape)} do not fit: give [B, D] with "
            "[V, D] or [B, M, D]"
        )
    choices = vectors.shape[-2]
    if target.shape != hidden.shape[:1] or int(target.max()) >= choices:
        raise InputError(f"target must hold one position in 0..{choices - 1} for each of {len(hidden)} samples")
    if allowed is not None and allowed.shape != (len(hidden), choices):
        raise InputError(f"allowed must have the shape [{len(hidden)}, {choices}], not {list(allowed.shape)}")
