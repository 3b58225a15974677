"""Merges the signal stores of several ranks or machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minirec_pl.selection.store import SignalStore
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.identity import Identity

_FIELDS = {
    "reward": (
        *("reward_mean", "reward_std", "solve_share", "n_rollouts", "n_wasted", "rewards"),
        *("all_hit_streak", "all_miss_streak"),
    ),
    "prior": ("prior_hits", "prior_misses"),
    "solve_probability": ("solve_probability",),
    "alignment": ("alignment",),
    "gradient": ("gradient",),
    "embedding": ("embedding",),
}
_COUNTS = ("hits", "misses", "squared_weights")
_COUNTED = ("reward", "solve_probability")  # signals of which they are
_MATRICES = ("rewards", "gradient", "embedding")
_OLDER = {"model", "data", "seed"}  # which are digests alone


def merge_stores(stores: Sequence[SignalStore], names: Sequence[str] | None = None) -> SignalStore:
    """Joins stores sample by sample and signal by signal; the newest measurement counts.

    The pool is the union of the pools. A measurement is newer if its (epoch, step) is; of equally old ones that of the
    earlier store is kept.

    Args:
        stores: At least one; they may overlap.
        names: How error messages call them, for instance their file names.

    Returns:
        A new store with the settings of the first.

    Raises:
        InputError: If there is none, or two were measured with other fingerprints, thresholds or vector widths.
    """
    if not stores:
        raise InputError("there is no signal store to merge: give at least one")
    names = names or [f"store {number}" for number in range(1, len(stores) + 1)]
    states = [store.state_dict() for store in stores]
    for state, name in zip(states[1:], names[1:], strict=True):
        _refuse_unlike(states[0], names[0], state, name)
    sample_ids = torch.unique(torch.cat([state["sample_ids"] for state in states]))
    merged = SignalStore(
        sample_ids,
        solve_threshold=states[0]["solve_threshold"],
        seed=states[0]["seed"],
        fingerprints=states[0]["fingerprints"],
    )
    target = merged.state_dict()
    for name in _MATRICES:
        widths = [state[name].shape[1] for state in states if name in state]
        if widths:
            empty = torch.nan if name == "rewards" else 0.0
            target[name] = torch.full((len(sample_ids), max(widths)), empty, dtype=torch.float32)
    for state in states:
        rows = torch.searchsorted(sample_ids, state["sample_ids"])
        counted = _newer(_clock(state, *_COUNTED), _clock(target, *_COUNTED, rows=rows))
        for field in _COUNTS:
            _copy(state[field], target[field], rows, counted)
        for signal, fields in _FIELDS.items():
            newer = _newer(_clock(state, signal), _clock(target, signal, rows=rows))
            for field in (f"{signal}_epoch", f"{signal}_step", *fields):
                if field in state:
                    _copy(state[field], target[field], rows, newer)
    merged.load_state_dict(target, source="the merged signals")
    return merged


def _clock(state: dict[str, Any], *signals: str, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Epoch and step of the newest measurement of any of these signals."""
    newest, *others = [(state[f"{signal}_epoch"][rows], state[f"{signal}_step"][rows]) for signal in signals]
    for other in others:
        later = _newer(other, newest)
        newest = other[0].where(later, newest[0]), other[1].where(later, newest[1])
    return newest


def _newer(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    newer: Tensor = (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] > other[1]))
    return newer


def _copy(source: Tensor, target: Tensor, rows: Tensor, chosen: Tensor) -> None:
    if source.ndim == 2 and source.shape[1] < target.shape[1]:
        padding = torch.full((len(source), target.shape[1] - source.shape[1]), torch.nan, dtype=torch.float32)
        source = torch.cat([source, padding], dim=1)
    target[rows[chosen]] = source[chosen]


def _refuse_unlike(first: dict[str, Any], first_name: str, other: dict[str, Any], name: str) -> None:
    ours, theirs = first["fingerprints"], other["fingerprints"]
    facts = {key: value for key, value in theirs.items() if key not in _OLDER}
    for difference in Identity(facts).differences(ours):
        raise InputError(
            f"{name} was measured for something else than {first_name} ({difference}): merge only signals of one "
            "policy, data set and seed"
        )
    for key in sorted((ours.keys() | theirs.keys()) & (_OLDER | (ours.keys() ^ theirs.keys()))):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{name} was measured with another {key} than {first_name} ({theirs.get(key)}, not {ours.get(key)}): "
                "merge only signals of one policy, data set and seed"
            )
    if first["solve_threshold"] != other["solve_threshold"]:
        raise InputError(
            f"{name} counts a reward above {other['solve_threshold']} as solved, {first_name} one above "
            f"{first['solve_threshold']}: score both with one threshold"
        )
    for vector in ("gradient", "embedding"):
        if vector in first and vector in other and first[vector].shape[1] != other[vector].shape[1]:
            raise InputError(
                f"{name} has a {vector} of {other[vector].shape[1]} columns, {first_name} one of "
                f"{first[vector].shape[1]}: merge only signals of one policy"
            )
