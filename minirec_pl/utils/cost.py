"""What a run spent: tokens through the model, rollouts and seconds, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["warm_start", "scoring", "selection", "training"]
PHASES: tuple[Phase, ...] = ("warm_start", "scoring", "selection", "training")


def _zeros() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)


def _no_tokens() -> dict[str, int]:
    return dict.fromkeys(PHASES, 0)


@dataclass
class Cost:
    """Running totals of one run; evaluation on validation and test data is not counted.

    Attributes:
        tokens_forward: tokens fed through the model without or before a backward pass, by phase.
        tokens_backward: tokens through the backward pass, by phase.
        rollouts: sampled completions, by phase.
        seconds: wall-clock seconds, by phase; training includes waiting for data.
    """

    tokens_forward: dict[str, int] = field(default_factory=_no_tokens)
    tokens_backward: dict[str, int] = field(default_factory=_no_tokens)
    rollouts: dict[str, int] = field(default_factory=_no_tokens)
    seconds: dict[str, float] = field(default_factory=_zeros)

    def add(
        self, phase: Phase, *, forward: int = 0, backward: int = 0, rollouts: int = 0, seconds: float = 0.0
    ) -> None:
        """Adds to one phase."""
        self.tokens_forward[phase] += forward
        self.tokens_backward[phase] += backward
        self.rollouts[phase] += rollouts
        self.seconds[phase] += seconds

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Adds the wall-clock seconds spent inside to `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def include(self, other: Mapping[str, Any]) -> None:
        """Adds the `state_dict` of another run, for example of the warm start a policy came from."""
        for name, totals in other.items():
            mine = getattr(self, name)
            for phase, value in totals.items():
                mine[phase] += value

    def state_dict(self) -> dict[str, Any]:
        """Returns plain dictionaries, for checkpoints."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the totals with those of `state_dict`."""
        for name, totals in state.items():
            setattr(self, name, dict(totals))

    def totals(self) -> dict[str, float]:
        """Sums over the phases: `rollouts`, `tokens` (forward and backward) and `seconds`."""
        tokens = sum(self.tokens_forward.values()) + sum(self.tokens_backward.values())
        seconds = round(sum(self.seconds.values()), 3)
        return {"rollouts": sum(self.rollouts.values()), "tokens": tokens, "seconds": seconds}

    def row(self) -> dict[str, Any]:
        """Makes the cost columns of `results.json`: sums of tokens over the phases, rollouts and seconds by phase."""
        return {
            "rollouts": {phase: self.rollouts[phase] for phase in ("scoring", "training")},
            "tokens": {
                "forward": sum(self.tokens_forward.values()),
                "backward": sum(self.tokens_backward.values()),
            },
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
        }
