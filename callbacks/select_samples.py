"""Picks the samples of the coming epoch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from minirec_pl.selection.budget import budget_count, check_budget
from minirec_pl.selection.diagnostics import Diagnostics
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.remedies import NEAR_ZERO
from minirec_pl.selection.selectors.baselines import FullSelector
from minirec_pl.selection.selectors.checked import check_selector, pick
from minirec_pl.selection.selectors.minirec import MiniRecSelector
from minirec_pl.selection.selectors.protocol import Selector, goes_by_outcomes, signal_options
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.ledger_data import check_ledger
from minirec_pl.selection.session.prediction import Predictions
from minirec_pl.selection.session.run_files import diagnostics, leave_files
from minirec_pl.selection.session.session import SelectionSession, session_of
from minirec_pl.utils.errors import InputError, check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SelectSamples(SessionCallback):
    """Trains each epoch on the samples a selector picks, or on those of a ledger written before.

    Writes `ledger.parquet` (every sample's scores, rank and reason), `diagnostics.json` and `signals.safetensors` of
    the last selection to the run folder when the fit ends or fails, and before that at most once a minute. Warns at
    the first selection if the scores are degenerate. For a selector that predicts the solve probability it writes
    `calibration.png`, the last predictions beside what training met.

    Args:
        budget: samples per epoch: a float is a share of the pool, above 0 and at most 1, an int is a number of samples.
            None takes 0.1, or with `ledger` all that it selected; a smaller budget takes the ledger's best. With
            `adaptive_generations` of GRPORecModule it is the rollouts of so many samples with `num_generations` each.
        selector: picks the samples; None takes `MiniRecSelector()`.
        ledger: parquet file of a selection to train on, fixed for all epochs; it takes the place of `selector`.
        warmup_epochs: epochs on the whole pool before the first selection.
        every_n_epochs: epochs from one selection to the next.

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
        check_budget(budget)
        check_whole(warmup_epochs=warmup_epochs, every_n_epochs=every_n_epochs)
        if warmup_epochs < 0 or every_n_epochs < 1:
            raise InputError(
                f"warmup_epochs is {warmup_epochs} and every_n_epochs {every_n_epochs}: give at least 0 and at least 1"
            )
        self.budget = 0.1 if budget is None and ledger is None else budget
        self.selector: Selector = MiniRecSelector() if selector is None else check_selector(selector)
        self._selector = self.selector
        self._predictions = Predictions()
        self.ledger = ledger
        self.warmup_epochs = warmup_epochs
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `select`."""
        if stage != "fit":
            return
        self.check_ledger()
        session = session_of(trainer)
        session.expect(self.warmup_epochs, self.expected)
        session.register("select", self._select, trainer)
        session.asked = signal_options(self.selector)
        self._selector = told_of(self.selector, pl_module)
        session.from_ledger = self.ledger is not None
        if self.ledger is None:
            predictor = getattr(self.selector, "predictor", None)
            session.predictor = predictor if isinstance(predictor, PredictedDifficulty) else None
            session.discount = getattr(session.predictor or self.selector, "discount", session.discount)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of a selector that has one."""
        own = getattr(self._selector, "state_dict", None)
        return {} if own is None else {"selector": own()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Gives the selector the state that it saved."""
        if "selector" in state_dict and hasattr(self._selector, "load_state_dict"):
            self._selector.load_state_dict(state_dict["selector"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last reliability curve of a selector that predicts."""
        super().on_fit_end(trainer, pl_module)
        session = session_of(trainer)
        folder = session.folder(trainer)
        if folder is not None and trainer.is_global_zero and any(session.reliability):
            try:
                from minirec_pl.reporting.plots import draw_reliability
            except ModuleNotFoundError:
                warnings.warn("calibration.png needs matplotlib: pip install 'minirec-pl[report]'", stacklevel=2)
                return
            predicted, observed = session.reliability
            draw_reliability(predicted, observed, folder / "calibration.png")

    def check_ledger(self) -> None:
        """Looks for the ledger.

        Raises:
            InputError: if one was given and is not there.
        """
        if self.ledger is not None and not Path(self.ledger).is_file():
            raise InputError(
                f"there is no ledger '{self.ledger}': give SelectSamples a ledger.parquet of an earlier run"
            )

    def expected(self, n_pool: int) -> int:
        """Returns the samples that each epoch after the warm-up trains on, of a pool of this size.

        Raises:
            InputError: if the budget is above the pool, or the ledger cannot be read.
        """
        if self.ledger is None:
            return n_pool if isinstance(self.selector, FullSelector) else budget_count(self.budget, n_pool)
        ledger = SelectionLedger.from_parquet(self.ledger)
        return ledger.n_selected if self.budget is None else budget_count(self.budget, len(ledger))

    def _select(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        since = epoch - self.warmup_epochs
        if since < 0:
            session.selected = None
            return
        again = session.selected is None or since % self.every_n_epochs == 0
        if not again and session.groups is None:
            return
        before = set(session.selected or ())
        try:
            with session.cost.timed("selection"):
                ledger = self._ledger(session, trainer, epoch) if again or session.ledger is None else session.ledger
                session.selected = self._chosen(session, ledger, trainer)
        except InputError as error:
            if not before:
                raise
            text = f"epoch {epoch + 1} keeps the selection of the epoch before: {error}"
            session.warn_once(trainer, text, text)
            return
        if not again:
            return
        first, session.ledger = session.ledger is None, ledger
        if first or trainer.loggers:
            found = diagnostics(session, trainer)
            for text in found.warnings if first else ():
                session.warn_once(trainer, f"selection: {text}", text.partition(":")[0])
            session.log(trainer, _figures(session, found, before))
        leave_files(session, trainer)

    def _ledger(self, session: SelectionSession, trainer: Trainer, epoch: int) -> SelectionLedger:
        return self._pick(session, trainer, epoch) if self.ledger is None else self._fixed(session, trainer)

    def _chosen(self, session: SelectionSession, ledger: SelectionLedger, trainer: Trainer) -> list[int]:
        if (groups := session.groups) is not None:
            ranked, n_samples = ledger.selected(), self.expected(len(session.store))
            chosen = groups.within_budget(ranked, n_samples)
            share = groups.share_of_budget(chosen, n_samples)
            if share < 1 and len(chosen) < len(ranked):
                text = (
                    f"{len(ranked) - len(chosen)} of {len(ranked)} samples need more than "
                    f"{groups.sizer.adaptive.max} rollouts and are left out, so that the epoch has {share:.0%} of the "
                    "rollouts of the budget: raise adaptive_generations.max, lower adaptive_generations.q, or lower "
                    "the budget"
                )
                session.warn_once(trainer, text, text)
            return chosen
        return ledger.selected(
            None if self.ledger is None or self.budget is None else budget_count(self.budget, len(ledger))
        )

    def _pick(self, session: SelectionSession, trainer: Trainer, epoch: int) -> SelectionLedger:
        """The ledger; where groups are of unequal size, of as many picks as have the rollouts of the budget."""
        if self.selector.needs and not session.scored:
            raise InputError(
                f"{type(self.selector).__name__} needs scored samples: add the callback RescoreSamples(), as MiniRec "
                "does, or train on a ledger"
            )
        if goes_by_outcomes(self.selector):
            self._check_outcomes(session, trainer, epoch)
        if session.predictor is not None:
            self._predictions.refit(session, trainer, epoch)
        view = session.store.pool_view(epoch)
        view.vectors = self._predictions.vectors
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asked = n_samples = budget_count(self.budget, len(view))
            ledger = pick(self._selector, view, asked, epoch)
            while session.groups is not None and asked == ledger.n_selected < len(view):
                share = session.groups.share_of_budget(ledger.selected(), n_samples)
                if share >= 1:
                    break
                asked = min(len(view), max(asked + 1, math.ceil(asked * min(4.0, 1.1 / max(share, 0.1)))))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of fewer picks than asked for
                    ledger = pick(self._selector, view, asked, epoch)
        for warning in caught:
            if warning.category is UserWarning:
                session.warn_once(trainer, str(warning.message), str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        ledger.fingerprints = dict(session.store.fingerprints)
        return ledger

    def _check_outcomes(self, session: SelectionSession, trainer: Trainer, epoch: int) -> None:
        name = type(self.selector).__name__
        if not session.has("record"):
            raise InputError(
                f"{name} goes by the rewards met in training: add the callback RewardHistory(), as MiniRec does"
            )
        module = trainer.lightning_module
        if getattr(self.selector, "groups", False):
            _check_groups(name, module)
        if epoch > 0 and not session.store.has_outcomes:
            text = (
                f"{name} goes by the rewards met in training, and training_step of {type(module).__name__} returned "
                'none: return {"loss": ..., "signals": SampleSignals(sample_id, rewards=...)}'
            )
            session.warn_once(trainer, text, text)
        drawn: int = getattr(module, "scoring_generations", 0)
        if self.selector.needs and drawn:
            text = (
                f"scoring draws {drawn} rollouts of each sample, which {name} does not read with "
                "signals='predicted': set scoring_generations to 0 on the module, unless its gradients need them"
            )
            session.warn_once(trainer, text, text)

    def _fixed(self, session: SelectionSession, trainer: Trainer) -> SelectionLedger:
        assert self.ledger is not None
        ledger = SelectionLedger.from_parquet(Path(self.ledger))
        check_ledger(ledger, self.ledger, session, trainer)
        strange = set(ledger.table["sample_id"]) - set(session.store.sample_ids.tolist())
        if strange:
            raise InputError(
                f"{self.ledger} has sample_id {min(strange)}, which is not in the pool: train on the data and split "
                "it was made for"
            )
        return ledger


# Lightning then counts it as stateless, and a second one is refused by the session, which says what to do.
update_wrapper(SelectSamples.state_dict, Callback.state_dict, assigned=())


def _check_groups(name: str, module: LightningModule) -> None:
    """Refuses a module that says it meets no groups whose rewards tell of the solve probability.

    Raises:
        InputError: naming the option.
    """
    rollouts = getattr(module, "rollouts", "sample")
    if getattr(module, "expectation", None) is not None:
        given = f"rollouts='{rollouts}' draws none"
    elif rollouts != "sample":
        given = f"rollouts='{rollouts}' draws rollouts that are all different"
    elif getattr(module, "distinct_rollouts", False):
        given = "distinct_rollouts has them all different"
    else:
        return
    raise InputError(
        f"{name} goes by groups of rollouts and {given}: choose PredictedSelector or MoPPSSelector, or set "
        "model.rollouts to sample and model.distinct_rollouts to false"
    )


def told_of(selector: Selector, module: LightningModule) -> Selector:
    """The selector with those of its options that are None taken from how a module trains.

    Args:
        selector: stays as it is.
        module: with `num_generations` and `objective`, as GRPORecModule has, or without.
    """
    objective = getattr(module, "objective", None)
    scale: str | None = getattr(objective, "scale_rewards", None)
    known = {
        "num_generations": getattr(module, "num_generations", None),
        "scale_rewards": "group" if scale == "batch" else scale,
        "baseline": getattr(objective, "baseline", None),
    }
    told = copy.copy(selector)
    for name, value in known.items():
        if value is not None and getattr(selector, name, value) is None:
            setattr(told, name, value)
    return told


def _figures(session: SelectionSession, found: Diagnostics, before: Collection[int]) -> dict[str, float]:
    """Returns what is logged of a selection, by name.

    Args:
        session: that has just selected.
        found: its diagnostics.
        before: sample_ids of the selection before, for the overlap; none for the first.
    """
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
        values["selection/share_near_zero"] = float((known < NEAR_ZERO).double().mean())
    figures = {
        "learnability_near_zero": found.learnability_near_zero,
        "learnability_weight": found.learnability_weight,
        "novelty_share": found.novelty_share,
        **{f"coverage/{name}": share for name, share in found.coverage.items()},
    }
    values |= {f"selection/{name}": value for name, value in figures.items() if not math.isnan(value)}
    if before:
        values["selection/overlap"] = len(set(before).intersection(session.selected)) / len(session.selected)
    return values
