"""The base class of the callbacks that order an epoch."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.session import SelectionSession, session_of
from minirec_pl.selection.signals import Array, as_ids, name_ids, repeated_ids
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.protocols import what_it_lacks
from minirec_pl.utils.seeds import check_seed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


class Curriculum(SessionCallback, ABC):
    """Plans each epoch: the chosen samples (the whole pool if none were chosen) in the order of `plan`.

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
    def plan(
        self, session: SelectionSession, trainer: Trainer, chosen: list[int], easiness: Tensor, epoch: int
    ) -> Sequence[int] | Array:
        """Orders the samples of one epoch.

        Args:
            session: with what is known of the samples, `session.store`, and the last ledger, `session.ledger`.
            trainer: of the run.
            chosen: [n] sample_ids, best first.
            easiness: float64 [n], of each of them, see above; finite.
            epoch: the coming epoch, from 0.

        Returns:
            The n sample_ids, each once, in the order to train on: a list, a tensor or an array.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Registers for the phase `order`."""
        if stage == "fit":
            if (wrong := what_it_lacks(type(self), type(self).__name__, Curriculum)) is not None:
                raise InputError(wrong)
            session_of(trainer).register("order", self._order, trainer)

    def _order(self, session: SelectionSession, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        with session.cost.timed("selection"):
            chosen = session.selected
            if chosen is None:
                chosen = session.store.sample_ids.tolist()
            easiness, session.plan_measure = session.easiness_in_words(chosen)
            if bool(easiness.isnan().all()):
                return
            easiness = easiness.nan_to_num(nan=float(easiness.nanmean()))
            plan = self.plan(session, trainer, list(chosen), easiness.clone(), epoch)
            session.plan = _checked(plan, chosen, f"{type(self).__name__}.plan")
            value = dict(zip(chosen, easiness.tolist(), strict=True))
            session.plan_easiness = [value[sample_id] for sample_id in session.plan]
        session.log(trainer, {"curriculum/length": float(len(session.plan))})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last plan."""
        super().on_fit_end(trainer, pl_module)
        session = session_of(trainer)
        folder = session.folder(trainer)
        if folder is not None and trainer.is_global_zero and session.plan_easiness:
            try:
                from minirec_pl.reporting.plots import draw_curriculum
            except ModuleNotFoundError:
                warnings.warn("curriculum.png needs matplotlib: pip install 'minirec-pl[report]'", stacklevel=2)
                return
            path = folder / "curriculum.png"
            what = (session.plan_epoch, path, self.order, session.plan_measure)
            draw_curriculum(session.plan_easiness, session.fold_starts, *what)


def _checked(plan: Sequence[int] | Array, chosen: list[int], name: str) -> list[int]:
    """The plan as a list; refuses one that has not each chosen sample once."""
    advice = "return each sample_id of `chosen` once, in the order to train on"
    try:
        ids = as_ids(plan)
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} returned a {type(plan).__name__} that is no list of sample_ids: {advice}") from error
    wanted = torch.tensor(chosen)
    faults = {
        "is not among the chosen": ids[~torch.isin(ids, wanted)],
        "occurs more than once": repeated_ids(ids),
        "is missing": wanted[~torch.isin(wanted, ids)],
    }
    for fault, wrong in faults.items():
        if len(wrong):
            raise InputError(f"{name} returned a plan in which sample_id {name_ids(wrong)} {fault}: {advice}")
    return ids.tolist()
