"""What selection can save of the tokens of a run, before it runs: arithmetic on the cost of one sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minirec_pl.utils.errors import InputError, check_whole

_LITTLE = 0.05  # a saving that no choice should rest on


@dataclass(frozen=True)
class BreakEven:
    """The cost of a sample, and how many groups teach nothing.

    In tokens through the model, forward and backward, as `minirec_pl.utils.cost.Cost` counts them:

    * to draw a group: D = P + w G C, the prompt once for its group;
    * to train on it: T = 2 (P + G C), forward and backward, for mixed groups only;
    * to score a sample: S, of which c N are scored per epoch, N being the pool.

    An epoch trains on m N mixed groups, m = min(budget, 1 - f). Without selection they take m N / (1 - f) draws, since
    a share f of the groups is flat. A perfect selector draws the mixed ones only.

    Attributes:
        prompt: P, tokens of a prompt.
        completion: C, tokens of a completion that are fed to the model; the last token of an item id is not.
        num_generations: G, rollouts of a group.
        scoring: S, tokens that it takes to score a sample.
        flat_share: f, share of the groups without reward variance, at least 0 and below 1.
        budget: mixed groups that an epoch trains on, as a share of the pool, above 0 and at most 1.
        decoding: w, cost of a decoded token, in tokens of a prompt. 1 counts tokens; more counts seconds, since a
            prompt is read at once and a completion is written token by token.

    Raises:
        InputError: if a number is out of range.

    Example:
        >>> setting = BreakEven(prompt=100, completion=50, num_generations=16, scoring=100, flat_share=0.8)
        >>> round(setting.saving(scored=0.0), 2), round(setting.saving(scored=1.0), 2)
        (0.57, 0.49)
    """

    prompt: float
    completion: float
    num_generations: int
    scoring: float
    flat_share: float = 0.0
    budget: float = 1.0
    decoding: float = 1.0

    def __post_init__(self) -> None:
        check_whole(num_generations=self.num_generations)
        if not 0 <= self.flat_share < 1:
            raise InputError(
                f"flat_share is {self.flat_share}: give the share of groups without reward variance, at least 0 and "
                "below 1; where all are flat, nothing can be learnt"
            )
        if not 0 < self.budget <= 1:
            raise InputError(f"budget is {self.budget}: give a share of the pool, above 0 and at most 1")
        for name, least in (("prompt", 1), ("completion", 0), ("num_generations", 2), ("scoring", 0), ("decoding", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: give a finite number of at least {least}")

    @property
    def draw(self) -> float:
        """D = P + w G C, tokens that it takes to draw a group."""
        return self.prompt + self.decoding * self.num_generations * self.completion

    @property
    def train(self) -> float:
        """T = 2 (P + G C), tokens that it takes to train on a group."""
        return 2 * (self.prompt + self.num_generations * self.completion)

    @property
    def trained(self) -> float:
        """Mixed groups of an epoch as a share of the pool, m = min(budget, 1 - f)."""
        return min(self.budget, 1 - self.flat_share)

    @property
    def unselected(self) -> float:
        """Tokens of an epoch per sample of the pool without selection, m (D / (1 - f) + T)."""
        return self.trained * (self.draw / (1 - self.flat_share) + self.train)

    def saving(self, scored: float) -> float:
        """Returns 1 - (m (D + T) + c S) / (m (D / (1 - f) + T)), what a perfect selector saves; below 0 for a loss.

        Without scoring, c = 0, it is f D / (D + (1 - f) T), the largest saving that any selector brings.

        Args:
            scored: c, samples scored per epoch as a share of the pool, at least 0.

        Raises:
            InputError: if it is below 0.
        """
        _check_scored(scored)
        return 1 - (self.trained * (self.draw + self.train) + scored * self.scoring) / self.unselected

    def needed(self, scored: float) -> float | None:
        """Returns the share of flat groups above which a perfect selector saves anything; None if it never does.

        It is c S / (budget D + c S), or, where fewer groups than the budget are mixed, c S / D.

        Args:
            scored: c, as in `saving`.
        """
        _check_scored(scored)
        cost = scored * self.scoring
        share = cost / (self.budget * self.draw + cost)
        if share > 1 - self.budget:
            share = cost / self.draw
        return share if share < 1 else None

    def verdict(self, schedules: Mapping[str, float]) -> str:
        """Says in a sentence what selection can bring.

        Args:
            schedules: c by name, of schedules that score; empty for a selection that scores nothing.
        """
        most, gains = self.saving(0.0), {name: self.saving(scored) for name, scored in schedules.items()}
        flat = f"{self.flat_share:.0%} of the groups are flat"
        if most < _LITTLE:
            return (
                f"Selection cannot pay here: {flat}, and a perfect selector that costs nothing would save {most:.0%} "
                "of the tokens. Train on the pool or on a random part of it."
            )
        if not gains:
            return f"Selection that scores nothing can save {most:.0%} of the tokens at most, as {flat}."
        if all(gain <= 0 for gain in gains.values()):
            return (
                f"Selection that scores cannot pay here: {flat}, which a perfect selector turns into a saving of "
                f"{most:.0%} of the tokens at most, and every schedule of scoring costs more. Select without a scoring "
                "pass, or train on random samples."
            )
        left = ", ".join(f"{gain:.0%} ({name})" for name, gain in gains.items())
        return f"Selection can save {most:.0%} of the tokens at most, as {flat}. After scoring, there remain {left}."


def schedules(epochs: int, rescore_fraction: float = 0.1) -> dict[str, float]:
    """Returns c, samples scored per epoch as a share of the pool, of the usual schedules of scoring.

    Args:
        epochs: E, at least 1.
        rescore_fraction: r, share of the pool that is scored again after each epoch, from 0 to 1.

    Returns:
        1 for the whole pool before every epoch, (1 + r (E - 1)) / E for once and a part of it after each epoch, 1 / E
        for once.

    Raises:
        InputError: if a number is out of range.
    """
    check_whole(epochs=epochs)
    if epochs < 1 or not 0 <= rescore_fraction <= 1:
        raise InputError(
            f"epochs is {epochs} and rescore_fraction {rescore_fraction}: give at least 1, and a share from 0 to 1"
        )
    return {
        "the whole pool before every epoch": 1.0,
        f"the whole pool once, {rescore_fraction:.0%} after each epoch": (1 + rescore_fraction * (epochs - 1)) / epochs,
        "the whole pool once": 1 / epochs,
    }


def _check_scored(scored: float) -> None:
    if not 0 <= scored < math.inf:
        raise InputError(f"scored is {scored}: give the samples scored per epoch as a share of the pool, at least 0")
