"""What a selection leaves in the run folder: `ledger.parquet`, `diagnostics.json`, `signals.safetensors` and more."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from minirec_pl.selection.diagnostics import NEAR_ZERO, Diagnostics, diagnose, notable
from minirec_pl.utils.files import write_atomically, write_json

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from minirec_pl.selection.session.session import SelectionSession

LEDGER, SIGNALS, DIAGNOSTICS = "ledger.parquet", "signals.safetensors", "diagnostics.json"
PLAN, EXAMPLES = "plan.parquet", "examples.parquet"
_PAUSE = 60.0  # seconds


class RunFiles:
    """Writes the files of the last selection when a fit ends, and before that at most once a minute.

    When it ends also `plan.parquet`, the last plan (see `plan_of`), and `examples.parquet`, the samples of `notable` in
    words, where the DataModule has words.
    """

    def __init__(self) -> None:
        self._written = time.monotonic()

    def write(self, session: SelectionSession, trainer: Trainer, *, at_once: bool) -> None:
        """Writes the files, all of the same selection, on the first rank.

        Args:
            session: with a ledger, else only the plan is written.
            trainer: whose run folder is written to.
            at_once: True at the end; False leaves it for later within a minute of the last time.

        Raises:
            InputError: if the folder cannot be written.
        """
        if not trainer.is_global_zero:
            return
        if not at_once and (session.ledger is None or time.monotonic() - self._written < _PAUSE):
            return
        folder = session.folder(trainer)
        if at_once and session.plan is not None:
            _write_table(plan_of(session), folder / PLAN)
        if session.ledger is None:
            return
        session.ledger.to_parquet(folder / LEDGER)
        write_json(folder / DIAGNOSTICS, diagnostics_of(session, trainer).as_dict())
        if session.scored:
            session.store.save(folder / SIGNALS)
        in_words = getattr(getattr(trainer, "datamodule", None), "sample_texts", None)
        if at_once and in_words is not None:
            ids = pd.concat([rows["sample_id"] for rows in notable(session.ledger).values()])
            _write_table(in_words(np.unique(ids.to_numpy(dtype=np.int64))), folder / EXAMPLES)
        self._written = time.monotonic()


def _write_table(table: pd.DataFrame, path: Path) -> None:
    write_atomically(path, lambda scratch: table.to_parquet(scratch, index=False))


def plan_of(session: SelectionSession) -> pd.DataFrame:
    """The plan of a session: epoch, position, fold (from 0), sample_id and easiness (NaN where the order is random)."""
    assert session.plan is not None
    position = np.arange(len(session.plan))
    return pd.DataFrame(
        {
            "epoch": session.plan_epoch,
            "position": position,
            "fold": np.searchsorted(session.fold_starts or [0], position, side="right") - 1,
            "sample_id": session.plan,
            "easiness": session.plan_easiness or np.nan,
        }
    )


def diagnostics_of(session: SelectionSession, trainer: Trainer) -> Diagnostics:
    """Diagnostics of the ledger of a session, with the coverage of users and items where the DataModule knows them."""
    assert session.ledger is not None
    describe = getattr(getattr(trainer, "datamodule", None), "users_and_items", None)
    return diagnose(session.ledger, None if describe is None else describe(session.store.sample_ids.numpy()))


def figures_of(session: SelectionSession, found: Diagnostics, before: Collection[int]) -> dict[str, float]:
    """What is logged of a selection, by name.

    Args:
        session: that has just selected.
        found: its diagnostics.
        before: sample_ids of the selection before, for the overlap; none for the first.
    """
    assert session.selected is not None
    chosen = session.easiness(session.selected)
    known = chosen[~chosen.isnan()]
    values = {
        "selection/size": float(len(session.selected)),
        "selection/pool": float(len(session.store)),
        "cost/selection_seconds": session.cost.seconds["selection"],
    }
    if len(known):
        values["selection/reward_mean"] = float(known.mean())
        values["selection/share_near_zero"] = float((known < NEAR_ZERO).double().mean())
    figures = {
        "learnability_near_zero": found.learnability_near_zero,
        "learnability_weight": found.learnability_weight,
        "novelty_share": found.novelty_share,
        **{f"coverage/{name}": share for name, share in found.coverage.items()},
    }
    values |= {f"selection/{name}": value for name, value in figures.items() if not math.isnan(value)}
    if before:
        values["selection/overlap"] = len(set(before).intersection(session.selected)) / len(session.selected)
    return values
