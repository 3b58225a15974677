"""Stores the rewards met in training, which cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.prediction import compare, forecast
from minirec_pl.selection.session.scorers import with_ids
from minirec_pl.selection.session.session import SelectionSession, nothing_trained, session_of
from minirec_pl.selection.signals import SampleSignals, gather_signals

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RewardHistory(SessionCallback):
    """Stores the `signals` that `training_step` returns beside its `loss`.

    A `training_step` that returns `{"loss": ..., "signals": SampleSignals(sample_id, rewards)}`, as that of
    `GRPORecModule` does, keeps the store up to date at no cost. Other return values are ignored. Where there are no
    rollouts, the solve probability stands for the mean reward. Where a selector predicts the solve probability, each
    plan logs how well the predictions agreed with what was met afterwards.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `record`."""
        if stage == "fit":
            session_of(trainer).register("record", self._record, trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stores the rewards of the batch, on every rank those of all ranks."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        signals = outputs.get("signals") if isinstance(outputs, Mapping) else None
        session = session_of(trainer)
        if not session.ready:
            return
        own = signals if isinstance(signals, SampleSignals) else None
        ids = None if own is None else session.batch_ids(batch_idx)
        if own is not None and ids is not None:
            own = with_ids(own, ids, f"{type(pl_module).__name__}.training_step")
        met = gather_signals(own, trainer.strategy.root_device)
        if met is None:
            return
        for part in met.of_equal_size():
            forecast(session, part)
            session.store.update(part, epoch=trainer.current_epoch, step=trainer.global_step, source="train")
            if part.rewards is not None:
                groups = part.rewards
                session.trained["samples"] += len(groups)
                session.trained["reward"] += float(groups.double().mean(dim=1).sum())
                session.trained["groups"] += len(groups)
                session.trained["mixed"] += int((groups.amax(dim=1) > groups.amin(dim=1)).sum())
            elif part.solve_probability is not None:
                session.trained["samples"] += len(part.solve_probability)
                session.trained["reward"] += float(part.solve_probability.double().sum())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the predictions for the last plan with what was met."""
        super().on_train_end(trainer, pl_module)
        self._compare(session_of(trainer), trainer)

    @staticmethod
    def _compare(session: SelectionSession, trainer: Trainer) -> None:
        if calibrated := compare(session):
            session.log(trainer, calibrated)

    def _record(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        trained = session.trained
        session.trained_reward = trained["reward"] / trained["samples"] if trained["samples"] else None
        if session.trained_reward is not None:
            session.log(trainer, {"selection/trained_reward": session.trained_reward})
        if trained["groups"]:
            session.log(trainer, {"selection/trained_share_mixed": trained["mixed"] / trained["groups"]})
        self._compare(session, trainer)
        session.trained = nothing_trained()
