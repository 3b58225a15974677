"""The interface of a selector."""

from __future__ import annotations

from typing import Protocol

from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.protocols import untyped

NEEDS = frozenset({"rewards", "gradient", "embedding"})


@untyped
class Selector(Protocol):
    """Picks samples by their signals; any object with `needs` and `select` will do."""

    @property
    def needs(self) -> frozenset[str]:
        """Signals it reads, out of "rewards", "gradient" and "embedding"."""

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks samples.

        Args:
            signals: Of the pool, N samples.
            k: Budget: number of samples to pick, 1..N.
            epoch: The coming epoch, for selectors that draw anew in each.

        Returns:
            The ledger, a row for each sample of `signals`.

        Raises:
            InputError: If k is not in 1..N, or a signal it needs was measured for no sample.

        Warns:
            UserWarning: If fewer than k samples can be picked.
        """


def goes_by_outcomes(selector: object) -> bool:
    """Whether a selector goes by the outcomes of training, which it says by an attribute `outcomes`."""
    return bool(getattr(selector, "outcomes", False))


def signal_options(selector: object) -> dict[str, str]:
    """Returns what a selector asks of `sample_signals`: its `gradient` and `gradient_space`, if not the default."""
    usual = {"gradient": "first", "gradient_space": "answer"}
    asked = {name: getattr(selector, name, default) for name, default in usual.items()}
    return {name: value for name, value in asked.items() if value != usual[name]}
