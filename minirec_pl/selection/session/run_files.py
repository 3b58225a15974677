"""What the last selection of a run leaves in the run folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from minirec_pl.selection.diagnostics import Diagnostics, diagnose, notable
from minirec_pl.selection.probes.head import HeadProbe
from minirec_pl.selection.remedies import Situation, Source
from minirec_pl.selection.session.scoring import is_sharded
from minirec_pl.utils.files import write_atomically, write_json

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from minirec_pl.selection.session.session import SelectionSession

LEDGER, SIGNALS, DIAGNOSTICS = "ledger.parquet", "signals.safetensors", "diagnostics.json"
PLAN, EXAMPLES = "plan.parquet", "examples.parquet"
_PAUSE = 60.0  # seconds between two writings of the files of a selection


def leave_files(session: SelectionSession, trainer: Trainer, *, at_end: bool = False) -> None:
    """Writes what the last selection leaves in the run folder, if there is one, on the first rank.

    `ledger.parquet`, `diagnostics.json` and, if the pool was scored, `signals.safetensors`. At the end also
    `plan.parquet` (see `plan_table`) and, where the DataModule has words, `examples.parquet`, the samples of
    `notable` in words. Without a ledger only the plan is written.

    Args:
        session: of the run.
        trainer: whose run folder is written to.
        at_end: False writes nothing within a minute of the last time.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder, ledger = session.placed, session.ledger
    if folder is None or not trainer.is_global_zero:
        return
    if not at_end and (ledger is None or time.monotonic() - session.written < _PAUSE):
        return
    if at_end and session.plan is not None:
        _write_table(plan_table(session), folder / PLAN)
    if ledger is None:
        return
    ledger.to_parquet(folder / LEDGER)
    write_json(folder / DIAGNOSTICS, diagnostics(session, trainer).as_dict())
    if session.scored or session.store.has_prior:
        session.store.save(folder / SIGNALS)
    in_words = getattr(getattr(trainer, "datamodule", None), "sample_texts", None)
    if at_end and in_words is not None:
        ids = pd.concat([rows["sample_id"] for rows in notable(ledger).values()])
        _write_table(in_words(np.unique(ids.to_numpy(dtype=np.int64))), folder / EXAMPLES)
    session.written = time.monotonic()


def finish(session: SelectionSession, trainer: Trainer) -> None:
    """Writes the files of the last selection; called when a fit ends or fails, where the first call counts."""
    if session.ends():
        leave_files(session, trainer, at_end=True)
        session.prune(trainer)


def plan_table(session: SelectionSession) -> pd.DataFrame:
    """Returns the plan: epoch (from 1), position and fold (from 0), sample_id, easiness and measure, what that is.

    The easiness is NaN where the order is random.
    """
    assert session.plan is not None
    position = np.arange(len(session.plan))
    return pd.DataFrame(
        {
            "epoch": session.plan_epoch + 1,
            "position": position,
            "fold": np.searchsorted(session.fold_starts or [0], position, side="right") - 1,
            "sample_id": session.plan,
            "easiness": session.plan_easiness or np.nan,
            "measure": session.plan_measure if session.plan_easiness else "unknown",
        }
    )


def diagnostics(session: SelectionSession, trainer: Trainer) -> Diagnostics:
    """Diagnoses the ledger, with the coverage of users and items where the DataModule knows them."""
    assert session.ledger is not None
    describe = getattr(getattr(trainer, "datamodule", None), "users_and_items", None)
    samples = None if describe is None else describe(session.store.sample_ids.numpy())
    return diagnose(session.ledger, samples, _situation(session, trainer))


def _situation(session: SelectionSession, trainer: Trainer) -> Situation:
    """How the last selection came about."""
    if session.from_ledger or not session.scored or session.predictor is not None:
        return Situation()
    module = trainer.lightning_module
    generations = getattr(module, "scoring_generations", None)
    source: Source = "module" if generations is None else "rollouts"
    if session.probe is not None:
        source = "head" if isinstance(session.probe, HeadProbe) else "probe"
    return Situation(
        signals=session.store.pool_view(session.plan_epoch),
        source=source,
        scoring_generations=int(generations or 0),
        can_have_gradients=not is_sharded(trainer),
        draws_rollouts=getattr(module, "expectation", None) is None,
    )


def _write_table(table: pd.DataFrame, path: Path) -> None:
    write_atomically(path, lambda scratch: table.to_parquet(scratch, index=False))
