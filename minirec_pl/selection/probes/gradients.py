"""Gradient signals of a softmax head in closed form: pure tensor functions.

For one softmax with logits z_m = (w_m . h + b_m) / tau, p = softmax(z), target t and y its one-hot vector:

    a   = d log p_t / dh    = W^T (y - p) / tau
    C a = -(d2 log p_t / dh2) a = (sum_m p_m w_m (w_m . a) - w_mean (w_mean . a)) / tau^2,  w_mean = sum_m p_m w_m

so that no graph and no second backward pass are needed. Paper: MiniRec (arXiv 2602.04278).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError

GradientKind = Literal["first", "hvp", "trajectory"]
GradientSpace = Literal["answer", "lora"]

_OWN_VECTORS = 5 * 2**19  # values of item vectors at a time: few enough to stay in a cache between the four products
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
        cosine: whether the head compares the unit state, h / |h|, with the vectors, which are unit vectors then.
        softcap: c where logits z become c tanh(z / c) before the temperature (Gemma 2), else None.
    """

    hidden: Tensor
    vectors: Tensor
    target: Tensor
    allowed: Tensor | None = None
    bias: Tensor | None = None
    temperature: float = 1.0
    cosine: bool = False
    softcap: float | None = None


def head_gradient(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    cosine: bool = False,
) -> Tensor:
    """First-order gradient of each sample at the state that its softmax head reads.

    g = dl/dh of l = -p / stop_gradient(p), p the softmax probability of the target: g = -d log p / dh.

    Args:
        hidden: float [B, D].
        item_vectors: float [V, D] shared by all samples (a catalogue), or [B, M, D] (target and negatives of each).
        target: int64 [B], the target's position among the vectors.
        temperature: divides the dot products.
        allowed: bool [B, V] or [B, M], the vectors in the softmax; None for all. A target outside has the signal 0.
        cosine: whether the head compares h / |h| with the vectors, which must be unit vectors then. The signal is at h
            all the same; a state of zeros has the signal 0.

    Returns:
        [B, D], float64 for float64 states and float32 otherwise, detached.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.
    """
    return _signal([HeadStep(hidden, item_vectors, target, allowed, None, temperature, cosine)], "gradient")[0]


def head_hvp(
    hidden: Tensor,
    item_vectors: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    cosine: bool = False,
) -> Tensor:
    """Hessian-vector product of each sample at the state that its softmax head reads, as MiniRec's authors publish it.

    u = d(g . g)/dh = 2 H g with g = dl/dh, l = -p / stop_gradient(p), p the softmax probability of the target. With
    a = d log p / dh it is 2 (|a|^2 a - C a), four products with the item vectors (see the module's head).

    Arguments, result and errors are those of `head_gradient`.

    Example:
        >>> head_hvp(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0])).shape
        torch.Size([1, 2])
    """
    return _signal([HeadStep(hidden, item_vectors, target, allowed, None, temperature, cosine)], "hvp")[0]


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
        InputError: if shapes do not fit, a target is not a position among the vectors, or `hvp` meets a softcap.
    """
    if kind == "hvp" and any(step.softcap is not None for step in steps):
        raise InputError(
            "gradient='hvp' is not for models that cap their logits, as Gemma 2 does: set gradient='first'"
        )
    return _signal(steps, kind)


class StepSoftmax(NamedTuple):
    """A step in float32 or float64.

    Attributes:
        hidden: [B, D], for cosines the unit states n = h / |h|.
        scale: what d(dots)/dh is divided by in d(logits)/dh: tau, for cosines tau |h|, [B, 1].
        vectors: as in the step.
        dots: [B, M], of the states and the vectors.
        p: [B, M]; 0 in rows without a possible target.
        residual: [B, M], y - p, times the slope of a softcap; 0 likewise.
        logp: [B].
    """

    hidden: Tensor
    scale: Tensor | float
    vectors: Tensor
    dots: Tensor
    p: Tensor
    residual: Tensor
    logp: Tensor


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Without a graph and without autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _dtype(step: HeadStep) -> torch.dtype:
    return torch.float64 if step.hidden.dtype == torch.float64 else torch.float32


def step_softmax(step: HeadStep) -> StepSoftmax:
    """The softmax of one step, all rows at once."""
    dtype = _dtype(step)
    hidden, vectors, scale = step.hidden.to(dtype), step.vectors.to(dtype), step.temperature
    there = possible = step.target >= 0
    if step.cosine:
        radius = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
        possible = possible & (radius[:, 0] > 0)
        radius = radius.clamp_min(torch.finfo(dtype).tiny)
        hidden, scale = hidden / radius, radius * step.temperature
    dots = logits = _dots(hidden, vectors)
    if step.bias is not None:
        logits = logits + step.bias.to(dtype)
    if step.softcap is not None:
        squashed = torch.tanh(logits / step.softcap)
        logits, slope = step.softcap * squashed, 1 - squashed.square()
    logits = logits / step.temperature
    target = step.target.clamp(min=0)[:, None]
    if step.allowed is not None:
        logits = logits.masked_fill(~step.allowed, torch.finfo(dtype).min)
        possible = possible & step.allowed.gather(1, target)[:, 0]
    logps = logits.log_softmax(dim=1)
    one = possible[:, None].to(dtype)
    p = logps.exp() * one
    logp = logps.gather(1, target)[:, 0].masked_fill(~possible, -torch.inf).masked_fill(~there, 0.0)
    residual = (-p).scatter_add_(1, target, one)
    return StepSoftmax(hidden, scale, vectors, dots, p, residual if step.softcap is None else residual * slope, logp)


def _dots(directions: Tensor, vectors: Tensor) -> Tensor:
    """Dot products [B, M] of directions [B, D] with the vectors."""
    return directions @ vectors.T if vectors.ndim == 2 else torch.bmm(directions[:, None], vectors.mT)[:, 0]


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=1, keepdim=True)


def _slope(soft: StepSoftmax, weights: Tensor, outwards: Tensor | None = None) -> Tensor:
    """sum_m weights_m d(logits_m)/dh [B, D], plus a multiple [B, 1] of the unit state for cosines.

    The derivative of n = h / |h| is (I - n n^T) / |h|.
    """
    weights = weights / soft.scale
    own = soft.vectors.ndim == 3
    total = torch.bmm(weights[:, None], soft.vectors)[:, 0] if own else weights @ soft.vectors
    if isinstance(soft.scale, Tensor):
        along = -_sum(weights * soft.dots)
        total.addcmul_(along if outwards is None else along + outwards, soft.hidden)
    return total


def _signal(steps: Sequence[HeadStep], kind: Literal["gradient", "first", "hvp"]) -> tuple[Tensor, Tensor]:
    """(signal [B, D], log p [B]), rows in portions that bound the memory; `gradient` is dl/dh, `first` without p."""
    for step in steps:
        check_step(step)
    portion = min(
        _LOGITS // len(step.vectors) if step.vectors.ndim == 2 else _OWN_VECTORS // step.vectors[0].numel()
        for step in steps
    )
    parts = []
    with exact(steps[0].hidden.device):
        steps = [
            step._replace(vectors=step.vectors.to(_dtype(step))) if step.vectors.ndim == 2 else step for step in steps
        ]
        for start in range(0, len(steps[0].hidden), max(1, portion)):
            rows = slice(start, start + max(1, portion))
            softs = [step_softmax(_part(step, rows)) for step in steps]
            logp = functools.reduce(torch.add, [soft.logp for soft in softs])
            if kind == "hvp":
                signals = _second_order(softs, [step.temperature for step in steps])
            else:
                factor = -logp.exp()[:, None] if kind == "first" else -1.0
                signals = [_slope(soft, factor * soft.residual) for soft in softs]
            signal = functools.reduce(torch.add, signals)
            if len(steps) > 1:  # a step that is possible where another is not
                signal = signal.masked_fill(logp.isneginf()[:, None], 0.0)
            parts.append((signal, logp))
    signal, logp = (torch.cat(part) for part in zip(*parts, strict=True))
    return signal, logp


def _second_order(softs: Sequence[StepSoftmax], temperatures: Sequence[float]) -> list[Tensor]:
    """2 (|a|^2 a - C a) of each step, where |a|^2 counts all of them.

    For cosines, r = |h|, a_m = W^T (y - p) and b = n . a_m: a = (a_m - b n) / (tau r) and
    u = 2 ((|a|^2 - b / (tau r^2)) a - (I - n n^T) C a / r^2 - |a_t|^2 n / r), C at the unit state, |a_t|^2 of the step.
    """
    terms = []
    for soft in softs:
        turn = _dots(_slope(soft, soft.residual), soft.vectors) / soft.scale
        bend = soft.p * (turn - _sum(soft.p * turn))
        terms.append((_sum(soft.residual * turn), bend))
    whole = functools.reduce(torch.add, [square for square, _ in terms])
    signals = []
    for soft, (square, bend), temperature in zip(softs, terms, temperatures, strict=True):
        grown, outwards = whole, None
        if isinstance(soft.scale, Tensor):
            grown = whole - _sum(soft.residual * soft.dots) / soft.scale * (temperature / soft.scale)
            outwards = square * (-2 * temperature) / soft.scale
        signals.append(_slope(soft, (grown * soft.residual - bend) * 2, outwards))
    return signals


def _part(step: HeadStep, rows: slice) -> HeadStep:
    return step._replace(
        hidden=step.hidden[rows],
        vectors=step.vectors if step.vectors.ndim == 2 else step.vectors[rows],
        target=step.target[rows],
        allowed=None if step.allowed is None else step.allowed[rows],
    )


def check_step(step: HeadStep) -> None:
    """Refuses a step whose shapes do not fit.

    Raises:
        InputError: naming the shapes.
    """
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
