"""Orders the chosen samples from easy to hard."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from minirec_pl.errors import InputError
from minirec_pl.selection.curriculum import default_folds, fold_curriculum, fold_starts
from minirec_pl.selection.session import SelectionSession, session_of
from minirec_pl.selection.session_callback import SessionCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class EasyToHardCurriculum(SessionCallback):
    """Plans an epoch as random folds, each from easy to hard (see `minirec_pl.selection.fold_curriculum`).

    Leaves `curriculum.png`, the mean reward along the last plan, in the run folder.

    Args:
        n_folds: number of folds K; None takes one per 64 samples.
        seed: seed of the shuffle into folds.

    Raises:
        InputError: if `n_folds` is below 1.
    """

    def __init__(self, n_folds: int | None = None, seed: int = 42) -> None:
        super().__init__()
        if n_folds is not None and n_folds < 1:
            raise InputError(f"n_folds is {n_folds}: give at least 1, or null for one fold per 64 samples")
        self.n_folds = n_folds
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `order`."""
        if stage == "fit":
            session_of(trainer).register("order", self._order, trainer)

    def _order(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        with session.cost.timed("selection"):
            chosen = session.selected
            if chosen is None:
                chosen = session.store.sample_ids.tolist()
            easiness = session.easiness(chosen)
            if bool(easiness.isnan().all()):
                return
            easiness = easiness.nan_to_num(nan=float(easiness.nanmean()))
            n_folds = default_folds(len(chosen)) if self.n_folds is None else min(self.n_folds, len(chosen))
            session.plan = fold_curriculum(chosen, easiness, n_folds, seed=self.seed)
            value = dict(zip(chosen, easiness.tolist(), strict=True))
            session.plan_easiness = [value[sample_id] for sample_id in session.plan]
            session.fold_starts = fold_starts(len(chosen), n_folds)
        session.log(trainer, {"curriculum/n_folds": float(n_folds), "curriculum/length": float(len(session.plan))})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last plan."""
        session = session_of(trainer)
        if trainer.is_global_zero and session.plan_easiness:
            try:
                from minirec_pl.plots import draw_curriculum
            except ModuleNotFoundError:
                warnings.warn("curriculum.png needs matplotlib: pip install 'minirec-pl[report]'", stacklevel=2)
                return
            folder = session.folder(trainer)
            draw_curriculum(session.plan_easiness, session.fold_starts, session.plan_epoch, folder / "curriculum.png")
