"""Picks the samples of the coming epoch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from minirec_pl.errors import InputError
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.selectors import MiniRecSelector, Selector
from minirec_pl.selection.session import SelectionSession, session_of
from minirec_pl.selection.session_callback import SessionCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SelectSamples(SessionCallback):
    """Trains each epoch on the samples a selector picks, or on those of a ledger written before.

    Leaves `ledger.parquet` (every sample's scores, rank and reason) and `signals.safetensors` in the run folder.

    Args:
        budget: a fraction of the pool in (0, 1] as a float, or a number of samples as an int. None takes 0.1, or with
            `ledger` all that it selected; a smaller budget takes the ledger's best.
        selector: how to pick; `MiniRecSelector()` by default.
        ledger: parquet file of a selection to train on, fixed for all epochs; excludes `selector`.
        warmup_epochs: epochs on the whole pool before the first selection.
        every_n_epochs: a new selection every so many epochs.

    Raises:
        InputError: if the budget is not positive, a fraction above 1 or a number above the pool, or another option is
            out of range.
    """

    def __init__(
        self,
        budget: int | float | None = None,
        selector: Selector | None = None,
        ledger: str | None = None,
        warmup_epochs: int = 0,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__()
        if ledger is not None and selector is not None:
            raise InputError("SelectSamples takes a selector or a ledger, not both")
        check_budget(budget)
        if warmup_epochs < 0 or every_n_epochs < 1:
            raise InputError(
                f"warmup_epochs is {warmup_epochs} and every_n_epochs {every_n_epochs}: they must be at least 0 and 1"
            )
        self.budget = 0.1 if budget is None and ledger is None else budget
        self.selector = selector or MiniRecSelector()
        self._selector = self.selector
        self.ledger = ledger
        self.warmup_epochs = warmup_epochs
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `select`."""
        if stage != "fit":
            return
        if self.ledger is not None and not Path(self.ledger).is_file():
            raise InputError(
                f"there is no ledger '{self.ledger}': give SelectSamples a ledger.parquet of an earlier run"
            )
        session = session_of(trainer)
        session.register("select", self._select, trainer)
        session.gradient = getattr(self.selector, "gradient", "first")
        session.gradient_space = getattr(self.selector, "gradient_space", "answer")
        if isinstance(self.selector, MiniRecSelector) and self.selector.num_generations is None:
            self._selector = copy.copy(self.selector)
            self._selector.num_generations = getattr(pl_module, "num_generations", None)

    def _select(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        since = epoch - self.warmup_epochs
        if since < 0:
            session.selected = None
            return
        if session.selected is not None and since % self.every_n_epochs:
            return
        before = set(session.selected or ())
        try:
            with session.cost.timed("selection"):
                ledger = self._pick(session, epoch) if self.ledger is None else self._fixed()
                k = None if self.ledger is None or self.budget is None else budget_count(self.budget, len(ledger))
                session.selected = ledger.selected(k)
        except InputError as error:
            if not before:
                raise
            warnings.warn(f"epoch {epoch} keeps the selection of the epoch before: {error}", stacklevel=2)
            return
        session.ledger = ledger
        folder = session.folder(trainer)
        if trainer.is_global_zero:
            ledger.to_parquet(folder / "ledger.parquet")
            if session.scored:
                session.store.save(folder / "signals.safetensors")
        self._log(session, trainer, before)

    def _pick(self, session: SelectionSession, epoch: int) -> SelectionLedger:
        if self.selector.needs and not session.scored:
            raise InputError(
                f"{type(self.selector).__name__} needs scored samples: add the callback RescoreSamples(), as MiniRec "
                "does, or train on a ledger"
            )
        view = session.store.pool_view(epoch)
        return self._selector.select(view, budget_count(self.budget, len(view)), epoch=epoch)

    def _fixed(self) -> SelectionLedger:
        assert self.ledger is not None
        return SelectionLedger.from_parquet(Path(self.ledger))

    def _log(self, session: SelectionSession, trainer: Trainer, before: set[int]) -> None:
        assert session.selected is not None
        chosen = session.easiness(session.selected)
        known = chosen[~chosen.isnan()]
        values = {
            "selection/size": float(len(session.selected)),
            "selection/pool": float(len(session.store)),
            "cost/selection_seconds": session.cost.seconds["selection"],
        }
        if len(known):
            values["selection/reward_mean"] = float(known.mean())
            values["selection/share_near_zero"] = float((known < 0.05).double().mean())
        if before:
            values["selection/overlap"] = len(before.intersection(session.selected)) / len(session.selected)
        session.log(trainer, values)


def check_budget(budget: int | float | None) -> None:
    """Refuses budgets that no pool can meet.

    Raises:
        InputError: if the budget is not positive or a fraction above 1.
    """
    if budget is None:
        return
    if isinstance(budget, bool) or not budget > 0:
        raise InputError(
            f"budget is {budget}: give a fraction of the pool in (0, 1] such as 0.1, or a number of samples"
        )
    if isinstance(budget, float) and budget > 1.0:
        raise InputError(f"budget is {budget}: a fraction is at most 1.0; for a number of samples write an integer")


def budget_count(budget: int | float | None, n: int) -> int:
    """Number of samples that a budget means in a pool of n, at least 1.

    Raises:
        InputError: if a number of samples is above n.
    """
    if budget is None:
        return n
    if isinstance(budget, float):
        return max(1, int(budget * n))
    if budget > n:
        raise InputError(
            f"budget is {budget} samples but the pool has {n}: give at most {n}, or a fraction such as 0.1"
        )
    return budget


__all__ = ["SelectSamples"]
