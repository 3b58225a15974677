"""Scores the pool before the first epoch and part of it again after each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.scorers import Probe, check_probe
from minirec_pl.selection.session.scoring import refuse_sharded
from minirec_pl.selection.session.session import SelectionSession, session_of
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RescoreSamples(SessionCallback):
    """Measures rewards, gradient signals and embeddings of samples, in one pass.

    Scores the whole pool or a random part of it before the first selection, and the stalest `rescore_fraction` after
    each epoch, samples never scored first; with `fast_dev_run` at most 64. What was never scored is not picked.

    Args:
        rescore_fraction: share of the pool that is scored again after each epoch, from 0 (never) to 1 (all of it).
        probe: how to score: a `HeadProbe`, or any function `probe(module, batch) -> SampleSignals`; None calls the
            module's `sample_signals(batch)`.
        score_fraction: share of the pool that is scored before the first selection, above 0 and at most 1.

    Raises:
        InputError: if a fraction is out of range, or the probe is none.
    """

    def __init__(self, rescore_fraction: float = 0.1, probe: Probe | None = None, score_fraction: float = 1.0) -> None:
        super().__init__()
        check_probe(probe)
        if not 0.0 < score_fraction <= 1.0:
            raise InputError(f"score_fraction is {score_fraction}: give a part of the pool, above 0 and at most 1")
        if not 0.0 <= rescore_fraction <= 1.0:
            raise InputError(f"rescore_fraction is {rescore_fraction}: give a part of the pool, from 0 to 1")
        self.rescore_fraction = rescore_fraction
        self.probe = probe
        self.score_fraction = score_fraction

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `rescore`."""
        if stage == "fit":
            session = session_of(trainer)
            session.register("rescore", self._rescore, trainer)
            session.probe = self.probe
            refuse_sharded(trainer, self.probe)

    def _rescore(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        store = session.store
        count = math.ceil(self.score_fraction * len(store))
        if session.scored:
            count = round(self.rescore_fraction * len(store))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            count = min(count, 64)
        if count == 0:
            return
        session.score(trainer, module, store.stalest(count), epoch)
        session.scored = True
        session.log(
            trainer, {"selection/scored": float(count), "cost/scoring_seconds": session.cost.seconds["scoring"]}
        )
