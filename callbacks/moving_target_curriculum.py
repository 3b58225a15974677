"""Orders the chosen samples by how near they are to a difficulty that follows the training reward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.selection.curriculum import move_target, target_curriculum
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from minirec_pl.selection.session.session import SelectionSession


class MovingTargetCurriculum(Curriculum):
    """Plans an epoch by distance to a target difficulty, nearest first (AdaRFT, arXiv 2504.05520).

    The target moves between epochs with the mean reward met in training (see `minirec_pl.selection.move_target` and
    `target_curriculum`), which `RewardHistory` stores. Checkpoints keep the target. Logs
    `curriculum/target_difficulty`.

    Args:
        target: target difficulty of the first epoch, from 0 (easiest) to 1; difficulty is 1 - mean reward.
        step_size: eta, how far the target moves at most between epochs, in units of difficulty.
        sensitivity: alpha, how steeply the move depends on the reward, per unit of reward.
        target_reward: beta, mean reward at which the target stays.
        seed: seed of the order of samples that are equally near.

    Raises:
        InputError: if an option is out of range, or no rewards were met in training.
    """

    order = "nearest to the target difficulty first"

    def __init__(
        self,
        target: float = 0.0,
        step_size: float = 0.5,
        sensitivity: float = 2.0,
        target_reward: float = 0.5,
        seed: int = 42,
    ) -> None:
        super().__init__(seed)
        if not 0.0 <= target <= 1.0:
            raise InputError(f"target is {target}: give a difficulty from 0 (easiest) to 1")
        for name, value in (("step_size", step_size), ("sensitivity", sensitivity)):
            if not 0.0 < value < math.inf:
                raise InputError(f"{name} is {value}: give a finite number above 0")
        if not math.isfinite(target_reward):
            raise InputError(f"target_reward is {target_reward}: give a finite number")
        self.target = target
        self.step_size = step_size
        self.sensitivity = sensitivity
        self.target_reward = target_reward

    def plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> list[int]:
        """Moves the target and orders by the distance to it, see `Curriculum.plan`."""
        target = self.target if session.target_difficulty is None else session.target_difficulty
        if session.trained_reward is not None:
            target = move_target(
                target,
                session.trained_reward,
                step_size=self.step_size,
                sensitivity=self.sensitivity,
                target_reward=self.target_reward,
            )
        elif session.plan_epoch >= 0:
            raise InputError(
                f"MovingTargetCurriculum follows the training reward, but epoch {session.plan_epoch + 1} met none: add "
                "the callback RewardHistory() and return `signals` with rewards from training_step"
            )
        session.target_difficulty = target
        session.log(trainer, {"curriculum/target_difficulty": target})
        return target_curriculum(chosen, easiness, target, seed=self.seed)
