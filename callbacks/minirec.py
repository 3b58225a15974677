"""Selects and orders the samples of each epoch, in one callback."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Literal

from lightning.pytorch import Callback

from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.callbacks.easy_to_hard_curriculum import EasyToHardCurriculum
from minirec_pl.callbacks.rescore_samples import RescoreSamples
from minirec_pl.callbacks.reward_history import RewardHistory
from minirec_pl.callbacks.select_samples import SelectSamples
from minirec_pl.selection.selectors.protocol import Selector, goes_by_outcomes
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.scorers import Probe
from minirec_pl.utils.errors import InputError


class MiniRec(SessionCallback):
    """Trains on a small part of the pool, chosen anew as the policy learns, from easy to hard (arXiv 2602.04278).

    The same as the callbacks `RewardHistory()`, `RescoreSamples(rescore_fraction, probe, score_fraction)`,
    `SelectSamples(budget, selector)` and `curriculum` together, its parts, on which it passes every hook of Lightning.
    With `curriculum="shuffled"` nothing is scored for a selector that needs no signals; with `budget=1.0` besides,
    nothing is scored or selected at all. For a selector that goes by the outcomes of training, such as
    `PredictedSelector`, nothing is scored whatever the curriculum: it orders by what they say.

    The pool is what the training loader would train on. `trainer.estimated_stepping_batches` counts the steps of this
    schedule when `configure_optimizers` reads it, rounded up to whole steps per epoch where there is a warm-up. With
    `adaptive_generations` it counts plans in which each sample has `num_generations`.

    Args:
        budget: samples per epoch: a float is a share of the pool, above 0 and at most 1, an int is a number of samples.
            With `adaptive_generations` of GRPORecModule it is the rollouts of so many samples with `num_generations`
            each.
        warmup_epochs: epochs on the whole pool before the first selection.
        every_n_epochs: epochs from one selection to the next.
        rescore_fraction: share of the pool, from 0 to 1, that is scored again after each epoch, stalest first.
        selector: picks the samples; None takes `MiniRecSelector()`.
        curriculum: how to order the picks, anew every epoch; None takes `EasyToHardCurriculum()`, "shuffled" shuffles.
            The others are `HardToEasyCurriculum`, `MovingTargetCurriculum` and `GaussianCurriculum`.
        probe: how a module without `sample_signals(batch)` is scored, for instance `HeadProbe("classifier")`; or any
            function `probe(module, batch) -> SampleSignals`.
        score_fraction: share of the pool, above 0 and at most 1, that is scored before the first selection, drawn at
            random. What was never scored is not picked. With a `rescore_fraction` as large, each epoch chooses
            among more of the pool.

    Raises:
        InputError: if an argument has another type, and as the single callbacks do.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MiniRec(budget=0.1)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        budget: int | float = 0.1,
        warmup_epochs: int = 0,
        every_n_epochs: int = 1,
        rescore_fraction: float = 0.1,
        selector: Selector | None = None,
        curriculum: Curriculum | Literal["shuffled"] | None = None,
        probe: Probe | None = None,
        score_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        if budget is None:
            raise InputError(
                "budget is None: give a fraction of the pool such as 0.1, a number of samples, or 1.0 for all"
            )
        if not (curriculum is None or curriculum == "shuffled" or isinstance(curriculum, Curriculum)):
            raise InputError(
                f"curriculum is {curriculum!r}: give 'shuffled', or an object such as EasyToHardCurriculum() of a "
                "subclass of Curriculum"
            )
        select = SelectSamples(budget, selector, warmup_epochs=warmup_epochs, every_n_epochs=every_n_epochs)
        self.selector = select.selector
        rescore = RescoreSamples(rescore_fraction, probe, score_fraction)
        self.parts: list[SessionCallback] = [RewardHistory()]
        if curriculum == "shuffled" and isinstance(budget, float) and budget == 1.0:
            return
        self.parts.append(select)
        if select.selector.needs or not (curriculum == "shuffled" or goes_by_outcomes(select.selector)):
            self.parts.append(rescore)
        if curriculum != "shuffled":
            self.parts.append(curriculum or EasyToHardCurriculum())

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the parts that have one, by their `state_key`."""
        return {part.state_key: state for part in self.parts if (state := part.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Gives each part the state that it saved."""
        for part in self.parts:
            if part.state_key in state_dict:
                part.load_state_dict(state_dict[part.state_key])


def _passed_on(name: str) -> Callable[..., None]:
    """Makes a hook that calls the same hook of every part."""

    def hook(self: MiniRec, *args: Any, **kwargs: Any) -> None:
        for part in self.parts:
            getattr(part, name)(*args, **kwargs)

    hook.__name__ = name
    hook.__doc__ = f"Calls `{name}` of every part."
    return hook


for _name in dir(Callback):
    if not _name.startswith("_") and callable(getattr(Callback, _name)) and _name not in vars(MiniRec):
        setattr(MiniRec, _name, _passed_on(_name))

# Lightning then counts `MiniRec` as stateless, and a second one is refused by the session, which says what to do.
update_wrapper(MiniRec.state_dict, Callback.state_dict, assigned=())
