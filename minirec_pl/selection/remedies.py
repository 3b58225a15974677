"""What a warning about a selection advises: only what is not in force and, tried on the pool at hand, helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from minirec_pl.selection.learnability import group_difficulty, learnability, quantile_calibration
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.reasons import FILLED, TOO_EASY, TOO_HARD
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError

Source: TypeAlias = Literal["rollouts", "head", "probe", "module", "store", "table", "ledger"]
Change: TypeAlias = dict[str, Any]
NEAR_ZERO = 0.05  # below it a reward, a difficulty or a scaled learnability says "no"
MOST = 0.9  # share from which on nearly all are meant
DEFAULTS: Mapping[str, Any] = {
    "mode": "official",
    "difficulty": "mean",
    "calibrate": None,
    "alpha": 1.0,
    "beta": 1.0,
    "mu": 0.5,
    "sigma": None,
    "gate": (0.05, 0.95),
    "on_short": "shrink",
    "num_generations": None,
    "novelty": True,
    "learnability": "gaussian",
}


@dataclass(frozen=True)
class Situation:
    """How a selection came about.

    Attributes:
        signals: that the selector read; None where only its ledger is at hand.
        source: where the signals are from: `rollouts` of a module with `scoring_generations`, a HeadProbe (`head`),
            another `probe`, a `module` with `sample_signals`; in `minirec select` a `store` (safetensors) or a `table`;
            `ledger` where only that is at hand.
        scoring_generations: rollouts per sample, of the source `rollouts`.
        can_have_gradients: False where the strategy spreads the weights over the ranks.
        draws_rollouts: False where training takes the expected gradient, which no sample is too hard for.
    """

    signals: Signals | None = None
    source: Source = "ledger"
    scoring_generations: int = 0
    can_have_gradients: bool = True
    draws_rollouts: bool = True


class Remedies:
    """Says what helps against each fault of a selection.

    Args:
        ledger: of the selection.
        situation: how it came about.
    """

    def __init__(self, ledger: SelectionLedger, situation: Situation) -> None:
        self._ledger, self._at = ledger, situation
        reasons = set(ledger.columns["reason"].tolist())
        gated = bool(reasons & {TOO_HARD, TOO_EASY, FILLED})
        seen = {"mode": "paper" if gated else "official", "on_short": "fill" if FILLED in reasons else "shrink"}
        self._options = {**DEFAULTS, **seen, **ledger.options}
        self._options["gate"] = tuple(self._options["gate"])

    @property
    def draws_rollouts(self) -> bool:
        """Whether training draws rollouts."""
        return self._at.draws_rollouts

    @property
    def uses_learnability(self) -> bool:
        """Whether learnability has a weight."""
        return bool(self._options["alpha"] > 0)

    @property
    def uses_representativeness(self) -> bool:
        """Whether representativeness has a weight."""
        return bool(self._options["beta"] > 0)

    def against_flat_learnability(self, *, equal: bool) -> str:
        """What makes learnability tell samples apart.

        Args:
            equal: whether it is the same for all.
        """
        options, tried = self._options, list[Change]()
        gaussian = options["learnability"] == "gaussian"
        if gaussian and options["difficulty"] == "mean":
            tried.append({"difficulty": "pass_at_group"})
        if gaussian and options["calibrate"] is None:
            tried.append({"calibrate": "quantile", "sigma": None})
            inside = self._within(self._difficulty({}), options["gate"])
            if len(inside):
                tried.append({"mu": float(f"{float(inside.median()):.2g}"), "sigma": None})
        good = [change for change in tried if self._separates(change)]
        if not good and len(tried) == 3:
            good = [change for change in ({**tried[0], **tried[1]},) if self._separates(change)]
        if not good and self.uses_representativeness:
            good = [{"alpha": 0.0}]
        words = {
            "head": "give HeadProbe another `reward`",
            "probe": "let the probe return rewards that differ",
            "module": "let sample_signals return rewards that differ",
            "rollouts": self._more_rollouts() if self._draws_decide() else "",
        }
        return self._say(good, words.get(self._at.source, "") if equal else "")

    def against_flat_representativeness(self) -> str:
        """What makes representativeness tell samples apart, or takes it out."""
        signals = self._at.signals
        missing = signals is not None and (
            signals.gradient is None or (signals.gradient_known is not None and not bool(signals.gradient_known.any()))
        )
        words = ""
        if missing and self._at.can_have_gradients:
            words = {
                "head": "put gradient among the `signals` of HeadProbe",
                "probe": "let the probe return `gradient`",
                "module": "return `gradient` from sample_signals",
                "table": "give --gradients",
            }.get(self._at.source, "")
        elif self._at.source == "rollouts" and signals is not None and signals.solve_probability is None:
            words = self._more_rollouts()
        return self._say([{"beta": 0.0}] if self.uses_learnability else [], words)

    def against_hard_picks(self) -> str:
        """What keeps hopeless samples from being picked."""
        options, good = self._options, list[Change]()
        low, high = options["gate"]
        gate = (max(low, NEAR_ZERO), high if high > NEAR_ZERO else DEFAULTS["gate"][1])
        for difficulty in dict.fromkeys((options["difficulty"], "pass_at_group")):
            change = {"difficulty": difficulty, "mode": "paper", "gate": gate, "on_short": "shrink"}
            if len(self._within(self._difficulty(change), gate)):
                good.append(change)
        where = {
            "store": "score with a policy that was trained for longer",
            "table": "score with a policy that was trained for longer",
            "ledger": "score with a policy that was trained for longer",
        }
        return self._say(
            good, "" if good else where.get(self._at.source, "set warmup_epochs to train before selecting")
        )

    def against_much_novelty(self) -> str:
        """What lets the scores decide more."""
        larger = {"store": "give a larger --budget", "table": "give a larger --budget"}
        larger |= {"ledger": "make it with a larger budget"}
        whole = self._ledger.n_selected >= len(self._ledger)
        return self._say([{"novelty": False}], "" if whole else larger.get(self._at.source, "raise the budget"))

    def _draws_decide(self) -> bool:
        """Whether the difficulty in use comes from rollouts."""
        signals = self._at.signals
        return self._options["difficulty"] == "mean" or signals is None or signals.solve_probability is None

    def _more_rollouts(self) -> str:
        return f"set scoring_generations={max(4, 2 * self._at.scoring_generations)} on the module"

    def _difficulty(self, change: Change) -> Tensor:
        """The known difficulties with changed options, float64 [n]; none where that cannot be told."""
        kind = change.get("difficulty", self._options["difficulty"])
        signals = self._at.signals
        if signals is None:
            held = torch.from_numpy(self._ledger.columns["difficulty"])
            values = held if kind == self._options["difficulty"] else held[:0]
        elif kind == "mean":
            values = signals.reward_mean
        else:
            values = group_difficulty(signals.solve_chance(), self._options["num_generations"] or 8)
        return values[~values.isnan()]

    @staticmethod
    def _within(difficulty: Tensor, gate: tuple[float, float]) -> Tensor:
        return difficulty[(difficulty >= gate[0]) & (difficulty <= gate[1])]

    def _separates(self, change: Change) -> bool:
        """Whether learnability tells samples apart with changed options, and the selection still picks some."""
        options, difficulty = {**self._options, **change}, self._difficulty(change)
        if not self._new(change) or len(difficulty) < 2:
            return False
        if options["mode"] == "paper" and not len(self._within(difficulty, options["gate"])):
            return False
        mu, sigma = options["mu"], options["sigma"]
        try:
            if options["calibrate"] is not None:
                mu, sigma = quantile_calibration(difficulty, options["gate"])
            learn = learnability(difficulty, mu=mu, sigma=sigma)
        except InputError:
            return False
        return bool(learn.max() > learn.min()) and float((learn < NEAR_ZERO).double().mean()) < MOST

    def _new(self, change: Change) -> Change:
        return {name: value for name, value in change.items() if self._options[name] != value}

    def _say(self, changes: list[Change], words: str = "") -> str:
        command = self._at.source in ("store", "table")
        spelled = [_spell(new, command=command) for change in changes if (new := self._new(change))]
        said = ", or ".join(spelled)
        if said and self._at.source == "ledger":
            said = f"make the ledger again with {said}"
        elif said:
            said = f"select again with {said}" if command else f"set {said} on MiniRecSelector"
        return ", or ".join(part for part in (said, words) if part)


def _spell(change: Change, *, command: bool) -> str:
    if not command:
        return " and ".join(f"{name}={value!r}" for name, value in change.items())
    return " ".join(f"--selector.{name}={_flag(value)}" for name, value in change.items())


def _flag(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()
