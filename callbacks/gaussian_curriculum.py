"""Draws the chosen samples from levels of difficulty, easy ones early in the training, hard ones late."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.selection.curriculum import gaussian_curriculum
from minirec_pl.utils.errors import InputError, check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from minirec_pl.selection.session.session import SelectionSession


class GaussianCurriculum(Curriculum):
    """Plans an epoch by draws whose level of difficulty rises over the training (E2H, arXiv 2506.06632).

    See `minirec_pl.selection.gaussian_curriculum`. The length of the training is `trainer.max_epochs`.

    Args:
        n_levels: number K of levels of difficulty, equal parts of the chosen samples.
        exponent: beta, below 1 to leave the easy levels sooner; published are 0.25 and 0.5.
        width: sigma, spread over the levels, in levels; published are 0.75 and 0.5.
        seed: seed of the draws.

    Raises:
        InputError: if an option is out of range, or the Trainer has no `max_epochs`.
    """

    order = "easy ones early, hard ones late in the training"

    def __init__(self, n_levels: int = 4, exponent: float = 0.5, width: float = 0.5, seed: int = 42) -> None:
        super().__init__(seed)
        check_whole(n_levels=n_levels)
        if n_levels < 1:
            raise InputError(f"n_levels is {n_levels}: give at least 1")
        for name, value in (("exponent", exponent), ("width", width)):
            if not 0.0 < value < math.inf:
                raise InputError(f"{name} is {value}: give a finite number above 0")
        self.n_levels = n_levels
        self.exponent = exponent
        self.width = width

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `order`."""
        if stage == "fit" and (trainer.max_epochs is None or trainer.max_epochs < 1):
            raise InputError("GaussianCurriculum needs the length of the training: set `trainer.max_epochs`")
        super().setup(trainer, pl_module, stage)

    def plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> list[int]:
        """Draws by the progress of the training, see `Curriculum.plan`."""
        assert trainer.max_epochs is not None
        return gaussian_curriculum(
            chosen,
            easiness,
            epoch=min(epoch, trainer.max_epochs - 1),
            epochs=trainer.max_epochs,
            n_levels=min(self.n_levels, len(chosen)),
            exponent=self.exponent,
            width=self.width,
            seed=self.seed,
        )
