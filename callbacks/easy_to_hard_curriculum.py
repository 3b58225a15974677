"""Orders the chosen samples from easy to hard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.selection.curriculum import default_folds, fold_curriculum, fold_starts
from minirec_pl.utils.errors import InputError, check_whole

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from minirec_pl.selection.session.session import SelectionSession


class EasyToHardCurriculum(Curriculum):
    """Plans an epoch as random folds, each from easy to hard (see `minirec_pl.selection.fold_curriculum`).

    Args:
        n_folds: number of folds K; None takes one per 64 samples, 1 orders the whole epoch from easy to hard.
        seed: seed of the shuffle into folds.

    Raises:
        InputError: if `n_folds` is below 1.
    """

    def __init__(self, n_folds: int | None = None, seed: int = 42) -> None:
        super().__init__(seed)
        check_whole(n_folds=n_folds)
        if n_folds is not None and n_folds < 1:
            raise InputError(f"n_folds is {n_folds}: give at least 1, or null for one fold per 64 samples")
        self.n_folds = n_folds

    def plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> list[int]:
        """Orders each fold from easy to hard, see `Curriculum.plan`."""
        n_folds = default_folds(len(chosen)) if self.n_folds is None else min(self.n_folds, len(chosen))
        session.fold_starts = fold_starts(len(chosen), n_folds)
        session.log(trainer, {"curriculum/n_folds": float(n_folds)})
        return fold_curriculum(chosen, easiness, n_folds, seed=self.seed)
