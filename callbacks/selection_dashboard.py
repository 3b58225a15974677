"""Logs to W&B, TensorBoard or CSV what was selected, why, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from minirec_pl.reporting.dashboard_rows import phases, term_histograms, totals, wandb_row
from minirec_pl.selection.session.session import session_of
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.versions import check_pytorch_lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_STEP_METRICS = {  # what W&B plots them over by default
    "cost/tokens": ("val/ndcg@10", "val/hit_rate@10", "val/mrr", "val/coverage@10"),
    "cost/rollouts": ("train/reward", "reward", "reward_std", "frac_reward_zero_std", "entropy"),
}


class SelectionDashboard(Callback):
    """Logs each selection and plan, and the cost beside every figure, under stable names.

    | name | what | unit | when | loggers |
    |---|---|---|---|---|
    | `selection/ledger` | the ledger, a row per sample | table | each selection | W&B |
    | `curriculum/plan` | position, fold, sample_id, easiness, measure of the coming epoch | table | each plan | W&B |
    | `selection/TERM/pool` | a term of the ledger, over the pool | histogram | each selection | W&B, TensorBoard |
    | `selection/TERM/picks` | over the picks, in the same bins | histogram | each selection | W&B, TensorBoard |
    | `cost/rollouts` | scoring and training | completions | with each step and validation | all |
    | `cost/tokens` | forward and backward, all phases | tokens | with each step and validation | all |
    | `cost/seconds` | all phases, without evaluation | s | with each step and validation | all |
    | `cost/scoring_rollouts`, `cost/training_rollouts` | by phase | completions | each epoch's end | all |
    | `cost/PHASE_tokens` | PHASE is warm_start, scoring or training | tokens | each epoch's end | all |
    | `cost/warm_start_seconds`, `cost/training_seconds` | by phase | s | each epoch's end | all |

    TERM is difficulty, learnability, representativeness or novelty; one that the selector does not know is left out.
    Costs are running totals of the first rank. They are logged for modules with a `cost`, as those of this library.

    The documentation's page Metrics lists what the selection callbacks themselves log, to all loggers.

    W&B plots the validation over `cost/tokens` and the rewards over `cost/rollouts` unless told otherwise; every row
    that holds them holds all three costs. Other loggers take no tables: the ledger is the `ledger.parquet` of the run
    folder. No random number is drawn. `minirec dashboard` builds a W&B workspace and a report of these names.

    Args:
        max_rows: rows of a ledger's table; of a larger pool the picks, best first, and others at even distances.

    Raises:
        InputError: if `max_rows` is below 1.
    """

    def __init__(self, max_rows: int = 10_000) -> None:
        check_pytorch_lightning()
        super().__init__()
        check_whole(max_rows=max_rows)
        if max_rows < 1:
            raise InputError(f"max_rows is {max_rows}: give at least 1")
        self.max_rows = max_rows
        self._shown: tuple[int, Any] = (-1, None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells W&B what to plot over what."""
        if stage != "fit":
            return
        self._shown = (-1, None)
        if trainer.is_global_zero and _cost(pl_module) is not None:
            for experiment in _experiments(trainer, "WandbLogger"):
                for step_metric, names in _STEP_METRICS.items():
                    for name in names:
                        experiment.define_metric(name, step_metric=step_metric)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the plan that a run starts or resumes with."""
        self._show(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the plan of the epoch."""
        self._show(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what has been spent, beside the figures of the step, where the Trainer logs them."""
        self._show(trainer)  # a first plan that was made anew after this callback's turn
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._log_cost(trainer, pl_module, by_phase=False, on_step=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what has been spent, beside the figures of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_cost(trainer, pl_module, by_phase=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what has been spent, also by phase."""
        self._log_cost(trainer, pl_module, by_phase=True)

    def _log_cost(self, trainer: Trainer, module: LightningModule, *, by_phase: bool, on_step: bool = False) -> None:
        cost = _cost(module)
        if cost is not None and trainer.loggers:
            values = totals(cost) | (phases(cost) if by_phase else {})
            module.log_dict(values, on_step=on_step, on_epoch=not on_step, batch_size=1, rank_zero_only=True)

    def _show(self, trainer: Trainer) -> None:
        session = session_of(trainer)
        if not (trainer.is_global_zero and session.ready and trainer.loggers):
            return
        if session.plan_epoch == self._shown[0] and session.ledger is self._shown[1]:
            return
        new = session.ledger is not None and session.ledger is not self._shown[1]
        self._shown = (session.plan_epoch, session.ledger)
        boards, runs = (list(_experiments(trainer, kind)) for kind in ("TensorBoardLogger", "WandbLogger"))
        histograms = {}
        if new and boards + runs:
            assert session.ledger is not None
            histograms = term_histograms(session.ledger.table, session.selected or [])
        for experiment in boards:
            for name, (values, edges) in histograms.items():
                experiment.add_histogram(name, values, session.step(trainer), bins=edges)
        for experiment in runs:
            experiment.log(wandb_row(session, histograms if new else None, session.step(trainer), self.max_rows))


def _cost(module: LightningModule) -> Cost | None:
    cost = getattr(module, "cost", None)
    return cost if isinstance(cost, Cost) else None


def _experiments(trainer: Trainer, kind: str) -> Iterator[Any]:
    """Yields what the loggers of a class write to, whether of `lightning` or `pytorch_lightning`."""
    for logger in trainer.loggers:
        if any(base.__name__ == kind for base in type(logger).__mro__):
            yield logger.experiment  # type: ignore[attr-defined]
