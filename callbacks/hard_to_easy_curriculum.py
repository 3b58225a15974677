"""Orders the chosen samples from hard to easy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.selection.curriculum import hard_to_easy_curriculum

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from minirec_pl.selection.session.session import SelectionSession


class HardToEasyCurriculum(Curriculum):
    """Plans an epoch from hard to easy (see `minirec_pl.selection.hard_to_easy_curriculum`).

    Args:
        seed: seed of the order of samples that are equally hard.
    """

    order = "hard to easy"

    def __init__(self, seed: int = 42) -> None:
        super().__init__(seed)

    def plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> list[int]:
        """Orders from hard to easy, see `Curriculum.plan`."""
        return hard_to_easy_curriculum(chosen, easiness, seed=self.seed)
