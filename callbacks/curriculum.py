"""The base class of the callbacks that order an epoch."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.session import SelectionSession, session_of
from minirec_pl.utils.seeds import check_seed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


class Curriculum(SessionCallback, ABC):
    """Plans each epoch: the chosen samples (the whole pool if none were chosen) in the order of `_plan`.

    Samples are ordered by their easiness, the mean reward or exact solve probability; an unknown one counts as the
    mean. Where nothing is known at all, the epoch is shuffled. Writes `curriculum.png`, the easiness along the last
    plan, to the run folder.

    Attributes:
        order: the order in words, for the picture; None means folds from easy to hard.
    """

    order: str | None = None

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = check_seed(seed)

    @abstractmethod
    def _plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> list[int]:
        """Returns the chosen sample_ids in the order to train on."""

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
            session.plan = self._plan(session, trainer, chosen, easiness, epoch)
            value = dict(zip(chosen, easiness.tolist(), strict=True))
            session.plan_easiness = [value[sample_id] for sample_id in session.plan]
        session.log(trainer, {"curriculum/length": float(len(session.plan))})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last plan."""
        session = session_of(trainer)
        if trainer.is_global_zero and session.plan_easiness:
            try:
                from minirec_pl.reporting.plots import draw_curriculum
            except ModuleNotFoundError:
                warnings.warn("curriculum.png needs matplotlib: pip install 'minirec-pl[report]'", stacklevel=2)
                return
            path = session.folder(trainer) / "curriculum.png"
            draw_curriculum(session.plan_easiness, session.fold_starts, session.plan_epoch, path, self.order)
