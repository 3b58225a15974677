"""Reads the signals that a selector needs and makes the ledger of what it picked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minirec_pl.selection import reasons
from minirec_pl.selection.ledger import DIFFICULTY, SelectionLedger
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError

_ROWS = 16_384  # gradients turned to float64 at a time


def ascending(signals: Signals, k: int) -> Signals:
    """Checks the budget and sorts the signals by sample_id, without a copy where they are sorted already.

    Raises:
        InputError: If k is not in 1..N.
    """
    if not 1 <= k <= len(signals):
        raise InputError(f"the budget is {k} samples: give 1 to {len(signals)}, the size of the pool")
    ids = signals.sample_id
    return signals if bool((ids[1:] > ids[:-1]).all()) else signals.take(ids.argsort())


def vectors(signals: Signals, name: Literal["gradient", "embedding"], selector: object) -> tuple[Tensor, Tensor]:
    """Returns the gradients or embeddings, and which of them were measured.

    Args:
        signals: Of N samples.
        name: Which.
        selector: Who needs them, for the message.

    Returns:
        [N, D] float and [N] bool.

    Raises:
        InputError: If none was measured.
    """
    values: Tensor | None = getattr(signals, name)
    known: Tensor | None = getattr(signals, f"{name}_known")
    if values is None or (known is not None and not known.any()):
        article = "an" if name == "embedding" else "a"
        raise InputError(
            f"{type(selector).__name__} needs {article} {name} per sample: return `{name}` from sample_signals"
        )
    return values, torch.ones(len(signals), dtype=torch.bool) if known is None else known


def gradient_blocks(gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a matrix, perhaps a mapped file, as float64 on the CPU, some at a time."""
    for start in range(0, len(gradient), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, gradient[rows].double().cpu()


def row_norms(gradient: Tensor) -> Tensor:
    """Returns the length of each row, [N] float64, of [N, D]."""
    return torch.cat([torch.linalg.vector_norm(block, dim=1) for _, block in gradient_blocks(gradient)])


def solve_chance(signals: Signals, selector: object) -> Tensor:
    """Returns `Signals.solve_chance`, and refuses signals of which it is not known.

    Args:
        signals: Of N samples.
        selector: Who needs it, for the message.

    Returns:
        [N] float64 in [0, 1], NaN where neither is known.

    Raises:
        InputError: If it is known of no sample.
    """
    chance = signals.solve_chance()
    if bool(chance.isnan().all()):
        raise InputError(
            f"{type(selector).__name__} needs rewards or the exact solve probability: return `rewards` or "
            "`solve_probability` from sample_signals, or put reward among the `signals` of HeadProbe"
        )
    return chance


def outcomes(signals: Signals, selector: object) -> tuple[Tensor, Tensor]:
    """Returns the discounted counts of the rollouts met in training that hit and missed, and refuses signals without.

    Args:
        signals: Of N samples.
        selector: Who needs them, for the message.

    Returns:
        [N] float64 each.

    Raises:
        InputError: If no store kept them.
    """
    if signals.hits is None or signals.misses is None:
        raise InputError(
            f"{type(selector).__name__} goes by the rollouts met in training, of which these signals hold no counts: "
            "give what SignalStore.pool_view returns"
        )
    return signals.hits, signals.misses


def best_first(score: Tensor, k: int) -> Tensor:
    """Returns the rows of the k highest scores, highest first; ties go to the smaller row, NaN is left out.

    Args:
        score: [N] float.
        k: Number of rows.

    Returns:
        [at most k] int64.
    """
    rows = (~score.isnan()).nonzero()[:, 0]
    return rows[score[rows].argsort(descending=True, stable=True)[:k]]


def blank_columns(signals: Signals) -> dict[str, npt.NDArray[Any]]:
    """Columns of a ledger in which nothing is picked yet and each sample is below the budget, on copies."""
    n = len(signals)
    unknown = ("learnability", "representativeness", "score", "novelty", "value", "difficulty")
    known = ("sample_id", "reward_mean", "reward_std", "n_rollouts")
    return {
        **{name: getattr(signals, name).numpy().copy() for name in known},
        **{name: np.full(n, np.nan) for name in unknown},
        "rank": np.zeros(n, dtype=np.int64),
        "reason": np.full(n, reasons.BELOW_BUDGET, dtype=object),
        "redundant_with": np.full(n, -1),
    }


def ledger_of(
    signals: Signals,
    picks: Tensor,
    k: int,
    columns: Mapping[str, Tensor],
    dropped: Mapping[str, Tensor],
    difficulty_name: str = DIFFICULTY,
) -> SelectionLedger:
    """Makes the ledger of a pick.

    Args:
        signals: Of N samples, ascending by sample_id.
        picks: [at most k] int64, the rows picked, best first.
        k: The budget.
        columns: Values [N] by column of the ledger.
        dropped: Rows [N] bool that could not be picked, by reason.
        difficulty_name: See `SelectionLedger`.

    Raises:
        InputError: If nothing is picked.

    Warns:
        UserWarning: If fewer than k samples are picked.
    """
    table = blank_columns(signals)
    table |= {name: values.double().numpy().copy() for name, values in columns.items()}
    for reason, rows in dropped.items():
        table["reason"][rows.numpy()] = reason
    if len(picks) < k:
        lost = ", ".join(f"{int(rows.sum())} {reason}" for reason, rows in dropped.items() if rows.any())
        short = f"of {len(signals)} samples {lost}: {_more(signals, picks, dropped)}"
        if not len(picks):
            raise InputError(f"no sample can be picked; {short}")
        warnings.warn(f"picked {len(picks)} samples instead of {k}; {short}", stacklevel=3)
    table["rank"][picks.numpy()] = np.arange(1, len(picks) + 1)
    table["reason"][picks.numpy()] = reasons.SELECTED
    return SelectionLedger.of(table, difficulty_name=difficulty_name)


def _more(signals: Signals, picks: Tensor, dropped: Mapping[str, Tensor]) -> str:
    """What lets more samples be picked."""
    advice = []
    if len(picks):
        advice.append(f"lower the budget to {len(picks)}")
    if reasons.NEVER_SCORED in dropped and bool(dropped[reasons.NEVER_SCORED].any()):
        advice.append("score more samples")
    flat = [rows for reason, rows in dropped.items() if reason != reasons.NEVER_SCORED and bool(rows.any())]
    if flat and signals.solve_probability is None and bool((signals.n_rollouts > 1).any()):
        advice.append("draw more rollouts of each")
    return ", or ".join(advice) or "one reward of a sample has no variance, so take another selector"
