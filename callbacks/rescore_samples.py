"""Scores the pool before the first epoch and part of it again after each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minirec_pl.errors import InputError
from minirec_pl.probes import HeadProbe
from minirec_pl.selection.scoring import refuse_sharded
from minirec_pl.selection.session import SelectionSession, session_of
from minirec_pl.selection.session_callback import SessionCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RescoreSamples(SessionCallback):
    """Takes rewards, gradient signals and embeddings of samples from the module, in one pass.

    Before the first epoch every sample of the pool is scored; after each later epoch the stalest `rescore_fraction`;
    with `fast_dev_run` at most 64.

    Args:
        rescore_fraction: part of the pool that is scored again after an epoch, from 0 (never) to 1 (all of it).
        probe: how; None asks the module's `sample_signals(batch)`, any other module takes a `HeadProbe`.

    Raises:
        InputError: if the fraction is outside [0, 1].
    """

    def __init__(self, rescore_fraction: float = 0.1, probe: HeadProbe | None = None) -> None:
        super().__init__()
        if not 0.0 <= rescore_fraction <= 1.0:
            raise InputError(f"rescore_fraction is {rescore_fraction}: it is a part of the pool, from 0 to 1")
        self.rescore_fraction = rescore_fraction
        self.probe = probe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `rescore`."""
        if stage == "fit":
            session = session_of(trainer)
            session.register("rescore", self._rescore, trainer)
            session.probe = self.probe
            refuse_sharded(trainer, self.probe)

    def _rescore(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        store = session.store
        count = round(self.rescore_fraction * len(store)) if session.scored else len(store)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            count = min(count, 64)
        if count == 0:
            return
        session.score(trainer, module, store.stalest(count), epoch)
        session.scored = True
        session.log(
            trainer, {"selection/scored": float(count), "cost/scoring_seconds": session.cost.seconds["scoring"]}
        )
