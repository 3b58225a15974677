"""A selector of the user's own, checked: what it is, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import cast

import numpy as np

from minirec_pl.selection.ledger import COLUMNS, SelectionLedger
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.reasons import FILLED, SELECTED, WHY
from minirec_pl.selection.selectors.baselines import FullSelector
from minirec_pl.selection.selectors.picks import solve_chance, vectors
from minirec_pl.selection.selectors.protocol import NEEDS, Selector, goes_by_outcomes
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.protocols import accepts

_FORM = "`select(self, signals, k, *, epoch=0)`"


def check_selector(selector: object) -> Selector:
    """Refuses what is not a selector, and returns what is.

    Raises:
        InputError: naming the class and the member that it lacks.
    """
    name = type(selector).__name__
    if inspect.isclass(selector):
        raise InputError(f"selector is the class {selector.__name__}: give an object of it, {selector.__name__}(...)")
    if not callable(getattr(selector, "select", None)):
        raise InputError(
            f"selector is {selector!r}: give an object such as MiniRecSelector(), of a class with `needs` and {_FORM}"
        )
    if not accepts(selector.select, None, 1, epoch=0):  # type: ignore[attr-defined]
        raise InputError(f"{name}.select does not take what it is given: define {_FORM}")
    if not hasattr(selector, "needs"):
        raise InputError(
            f"{name} has no `needs`: set it to the signals that select reads, a frozenset out of "
            f"{', '.join(sorted(NEEDS))}, or an empty one"
        )
    needs = selector.needs
    if isinstance(needs, str) or not isinstance(needs, Collection) or any(name not in tuple(NEEDS) for name in needs):
        raise InputError(f"{name}.needs is {needs!r}: give a frozenset out of {', '.join(sorted(NEEDS))}")
    predictor = getattr(selector, "predictor", None)
    if goes_by_outcomes(selector) and predictor is not None and not isinstance(predictor, PredictedDifficulty):
        raise InputError(
            f"{name}.predictor is {predictor!r}: give an object of PredictedDifficulty or of a subclass of it"
        )
    return cast(Selector, selector)


def pick(selector: Selector, signals: Signals, k: int, epoch: int = 0) -> SelectionLedger:
    """Has a selector pick, and checks its ledger.

    Args:
        selector: that passed `check_selector`.
        signals: of the pool, N samples.
        k: the budget, 1..N.
        epoch: the coming epoch.

    Raises:
        InputError: naming the selector, if it returns anything but a ledger of these samples with 1 to k picks, or
            fails for lack of a signal that it needs.
    """
    name = f"{type(selector).__name__}.select"
    try:
        ledger = selector.select(signals, k, epoch=epoch)
    except InputError:
        raise
    except Exception:
        _check_signals(selector, signals)
        raise
    if not isinstance(ledger, SelectionLedger):
        raise InputError(
            f"{name} returned a {type(ledger).__name__}: return a SelectionLedger, as "
            "minirec_pl.selection.selectors.picks.ledger_of makes it"
        )
    columns, ids = ledger.columns, signals.sample_id.sort().values.numpy()
    for column in COLUMNS:
        if len(columns.get(column, ())) != len(ids):
            raise InputError(f"{name} returned a ledger without a {column} for each of the {len(ids)} samples: fill it")
    if not np.array_equal(columns["sample_id"], ids):
        raise InputError(
            f"{name} returned a ledger of other samples: return a row for each of `signals`, ascending by sample_id"
        )
    picked, reason = columns["rank"] != 0, columns["reason"]
    if not set(reason) <= WHY.keys() or not np.array_equal(picked, (reason == SELECTED) | (reason == FILLED)):
        raise InputError(
            f"{name} returned reasons that do not go with its ranks: give a pick the reason {SELECTED!r}, and the "
            f"others one of {', '.join(sorted(WHY.keys() - {SELECTED, FILLED}))}"
        )
    ranks = np.sort(columns["rank"][picked])
    if not np.array_equal(ranks, np.arange(1, len(ranks) + 1)):
        raise InputError(f"{name} returned ranks that are not 1..{len(ranks)}, each once: pick each sample once")
    if not 1 <= len(ranks) <= (len(ids) if isinstance(selector, FullSelector) else k):
        raise InputError(f"{name} picked {len(ranks)} samples for a budget of {k}: pick 1 to {k}")
    return ledger


def _check_signals(selector: Selector, signals: Signals) -> None:
    """Refuses signals without what the selector needs, which it has most likely failed of."""
    if "rewards" in selector.needs and not signals.n_rollouts.any():
        solve_chance(signals, selector)
    if "gradient" in selector.needs:
        vectors(signals, "gradient", selector)
    if "embedding" in selector.needs:
        vectors(signals, "embedding", selector)
